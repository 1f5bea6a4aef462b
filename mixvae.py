"""A variational autoencoder that separates a mixture of two images without ever seeing the sources.

Each input is the average of one MNIST digit and one Fashion-MNIST garment. One encoder gives two Gaussian latents, two
decoders give two images, and the loss is computed on the mixture alone (blind source separation). Trained that way, one
decoder discovers the digits and the other the garments.

    python mixvae.py --epochs 20

takes 70 s on two CPU cores. Blind, it gives digits and garments of the test set back at 26.2 dB PSNR (see README.md).
"""
import argparse, io, math, os, socket, sys, tempfile, time
from copy import deepcopy
from pathlib import Path

if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)  # figures go to files: whatever backend is inherited must not matter
try:
    import torch
    import torch.nn.functional as F
    from matplotlib.figure import Figure
    from torch import nn
    from torch.utils.data import DataLoader, Dataset, Sampler
    from torchvision.datasets import MNIST, FashionMNIST
    from torchvision.datasets.utils import check_integrity, extract_archive
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
    sys.exit(f"mixvae: {error}\nInstall matching builds: python -m pip install --upgrade torch torchvision matplotlib")


def load(dataset, root, train):
    """A torchvision data set (MNIST or FashionMNIST), downloaded or extracted again where needed, else OSError."""
    raw = Path(root, dataset.__name__, "raw")
    for retry in (False, True):
        try:
            return dataset(root, train=train, download=True)
        except Exception as error:  # of many kinds: no network, a wrong or a truncated file, no space, ...
            archives = [raw / name for name, md5 in dataset.resources if check_integrity(raw / name, md5)]
            if retry or not archives:
                cause = " ".join(f"{type(error).__name__}: {error}".split())
                names = ", ".join(name for name, _ in dataset.resources)
                raise OSError(f"cannot read or download {dataset.__name__}: {cause}\nDelete {raw} if it is damaged; "
                              f"put {names} there, or make a stand-in for --data: python test_mixvae.py DIR") from error
            for archive in archives:  # an extraction that was cut short: torchvision would not repeat it
                extract_archive(str(archive), str(raw))


class MixMNIST(Dataset):
    """Mixtures of digit i of MNIST and garment i of Fashion-MNIST: `mixed = digit / 2 + garment / 2`.

    An item is `(mixed, sources)`, float32 in [0, 1]: mixed (784,), sources (2, 784), digit first. A slice, list or
    tensor of B indices gives a batch, (B, 784) and (B, 2, 784). Attributes: `images` (N, 2, 784), uint8, and `labels`
    (N, 2), the classes.

    `split` is "train" (the first 55,000 training pairs), "val" (the last 5,000) or "test" (the 10,000 test pairs).
    `noise` is the standard deviation of Gaussian noise added to `mixed` alone, which is then clamped to [0, 1]: drawn
    afresh each time for training, the same every time otherwise. Raises OSError if the data cannot be had.
    """

    def __init__(self, root="data", split="train", noise=0.0, device="cpu"):
        both = [load(dataset, root, train=split != "test") for dataset in (MNIST, FashionMNIST)]
        n_val = max(1, len(both[0]) // 12)  # 5,000 of 60,000
        part = {"train": slice(-n_val), "val": slice(-n_val, None), "test": slice(None)}[split]
        self.images = torch.stack([one.data[part].flatten(1) for one in both], dim=1).to(device)
        self.labels = torch.stack([one.targets[part] for one in both], dim=1)
        self.noise, self.fixed_noise = noise, None
        if noise and split != "train":
            self.fixed_noise = torch.randn(len(self), 784, generator=torch.Generator().manual_seed(0)).to(device)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        sources = self.images[index] / 255  # (..., 2, 784), float32
        mixed = (sources[..., 0, :] + sources[..., 1, :]) / 2
        if self.noise:
            noise = torch.randn_like(mixed) if self.fixed_noise is None else self.fixed_noise[index]
            mixed = (mixed + self.noise * noise).clamp(0, 1)
        return mixed, sources


class Batches(Sampler):
    """Tensors of `size` indices into `data`, the last perhaps shorter, on its device; shuffled at each pass or not."""

    def __init__(self, data, size, shuffle):
        self.data, self.size, self.shuffle = data, size, shuffle

    def __len__(self):
        return math.ceil(len(self.data) / self.size)

    def __iter__(self):
        order = torch.randperm if self.shuffle else torch.arange
        return iter(order(len(self.data), device=self.data.images.device).split(self.size))


def make_loader(data, batch_size, shuffle=False):
    """A DataLoader that takes whole batches from `data`; no image is handled on its own."""
    # A DataLoader draws a seed at each pass: from a generator of its own, so that validation leaves training's alone.
    return DataLoader(data, batch_size=None, sampler=Batches(data, batch_size, shuffle), generator=torch.Generator())


def hidden_layers(widths):
    """Linear, batch norm (which brings the bias) and ReLU, from each width to the next."""
    return [layer for n_in, n_out in zip(widths, widths[1:])
            for layer in (nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU(inplace=True))]


class Encoder(nn.Sequential):
    """Mixtures (B, 784) to mean and log-variance of two latents: mean1, logvar1, mean2, logvar2, each (B, latent)."""

    def __init__(self, widths=(784, 1024, 512), latent=32):
        super().__init__(*hidden_layers(widths), nn.Linear(widths[-1], 4 * latent))

    def forward(self, mixed):
        return super().forward(mixed).chunk(4, dim=1)


class Decoder(nn.Sequential):
    """Latents (B, latent) to images (B, 784) in [0, 1]."""

    def __init__(self, widths=(32, 256, 512, 784)):
        super().__init__(*hidden_layers(widths[:-1]), nn.Linear(*widths[-2:]), nn.Sigmoid())


class VAE(nn.Module):
    """One encoder, two latents, two decoders. In a finished model source 1 is the digit and source 2 the garment.

    The buffer `variance`, for `separate`, is the Gaussian decoder's at a pixel of the mixture; `finish` calibrates it.
    """

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder1, self.decoder2 = Encoder(), Decoder(), Decoder()
        self.register_buffer("variance", torch.tensor(0.01))

    def decode(self, z1, z2):
        """Latents (B, latent) to (reconstruction, source1, source2), each (B, 784) in [0, 1]."""
        source1, source2 = self.decoder1(z1), self.decoder2(z2)
        return (source1 + source2) / 2, source1, source2

    def forward(self, mixed):
        """Mixtures (B, 784) to (reconstruction, source1, source2, mean1, logvar1, mean2, logvar2)."""
        mean1, logvar1, mean2, logvar2 = self.encoder(mixed)
        z1, z2 = mean1, mean2
        if self.training:  # the reparameterisation trick, z = mean + std * eps; evaluation decodes the means
            z1 = mean1 + (logvar1 / 2).exp() * torch.randn_like(mean1)
            z2 = mean2 + (logvar2 / 2).exp() * torch.randn_like(mean2)
        return *self.decode(z1, z2), mean1, logvar1, mean2, logvar2


class VAELoss(nn.Module):
    """The negative ELBO of the mixture, in nats per image up to a constant: reconstruction + KL divergence.

    Training is blind: the sources enter through their average alone, which is the mixture before any noise. Only with
    `supervised` are the reconstruction terms of source 1 (the digit) and source 2 (the garment) added.
    """

    def __init__(self, supervised=False):
        super().__init__()
        self.supervised = supervised

    def forward(self, outputs, sources):
        """The model's seven outputs and the sources (B, 2, 784) to scalars (total, reconstruction, KL divergence)."""
        reconstruction, source1, source2, mean1, logvar1, mean2, logvar2 = outputs
        # -log N(mixture | reconstruction, MSE I) = D/2 log(MSE) + constant, D = 784: a Gaussian decoder that always has
        # its best variance needs no weight against the KL (sigma-VAE, Rybkin et al. 2021, arxiv.org/abs/2006.13202).
        pairs = [(reconstruction, (sources[:, 0] + sources[:, 1]) / 2)]
        if self.supervised:
            pairs += [(source1, sources[:, 0]), (source2, sources[:, 1])]
        nll = sum(image.shape[1] / 2 * F.mse_loss(image, target).log() for image, target in pairs)
        # KL(N(mean, var) || N(0, I)) = -1/2 sum(1 + log var - mean^2 - var), of both latents
        # (Kingma & Welling 2014, appendix B, arxiv.org/abs/1312.6114)
        mean, logvar = torch.cat([mean1, mean2], dim=1), torch.cat([logvar1, logvar2], dim=1)  # (B, 2 * latent)
        kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(dim=1).mean()
        return nll + kl, nll, kl


@torch.no_grad()
def evaluate(model, data, criterion, device):
    """The mean (total, reconstruction, KL divergence) of `criterion` over `data`, in evaluation mode."""
    model.eval()
    sums = [len(mixed) * torch.stack(criterion(model(mixed.to(device)), sources.to(device))) for mixed, sources in data]
    return (torch.stack(sums).sum(dim=0) / len(data.dataset)).tolist()


def train_model(model, train_data, criterion, optimizer, epochs, val_data, device):
    """Train `model` on `device`, and leave it with the weights of the epoch that had the lowest validation loss.

    The data are DataLoaders of batches `(mixed, sources)`. `criterion` maps what the model returned and the sources to
    (total, reconstruction, KL divergence). The optimizer's learning rate is the peak of a one-cycle schedule (Smith &
    Topin 2019): up over two fifths of the steps, then down to 0. While it rises, the weight of the KL divergence rises
    from 0 to 1, so that more dimensions of the latents come into use (KL warm-up, Sonderby et al. 2016).

    Returns the training and the validation losses by epoch. Where Ctrl-C ends training early, both are shorter; where
    a loss is no longer finite, there is one more training loss. Before the first good epoch it raises instead:
    KeyboardInterrupt or FloatingPointError.
    """
    model.to(device)
    steps = epochs * len(train_data)
    rising = max(1, 2 * steps // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (steps - step) / max(1, steps - rising)))
    train_losses, val_losses, best_loss, best_state = [], [], math.inf, None
    print("epoch  train loss    val loss  reconstruction     KL  seconds")
    try:
        for epoch in range(1, epochs + 1):
            start, loss_sum = time.perf_counter(), torch.zeros((), device=device)
            model.train()
            for mixed, sources in train_data:
                if len(mixed) > 1:  # batch norm cannot train on one image
                    loss, _, kl = criterion(model(mixed.to(device)), sources.to(device))
                    kl_weight = min(1, (schedule.last_epoch + 1) / rising)  # last_epoch: PyTorch's count of the steps
                    optimizer.zero_grad()
                    (loss - (1 - kl_weight) * kl).backward()
                    optimizer.step()
                    schedule.step()
                    loss_sum += len(mixed) * loss.detach()  # read once an epoch: until then a GPU waits for nothing
            train_loss = loss_sum.item() / len(train_data.dataset)
            val_loss, reconstruction, kl = evaluate(model, val_data, criterion, device)
            train_losses.append(train_loss)
            if not math.isfinite(train_loss + val_loss):
                raise FloatingPointError(f"the loss is no longer finite in epoch {epoch}: try a lower --lr")
            val_losses.append(val_loss)
            if val_loss < best_loss:
                best_loss, best_state = val_loss, deepcopy(model.state_dict())
            print(f"{epoch:5}  {train_loss:10.2f}  {val_loss:10.2f}  {reconstruction:14.2f}  {kl:5.1f}  "
                  f"{time.perf_counter() - start:7.2f}{'  best' * (val_loss == best_loss)}")
    except (KeyboardInterrupt, FloatingPointError) as stop:
        if best_state is None:
            raise
        print(f"mixvae: {str(stop) or f'interrupted in epoch {epoch}'}; the best epoch before is kept", file=sys.stderr)
    model.load_state_dict(best_state)
    return train_losses, val_losses


@torch.no_grad()
def finish(model, val_set):
    """Calibrate `model.variance` and put the sources in order, digit first: both once, on 1,000 validation pairs.

    Blind training leaves to chance which decoder takes the digits: the order with the smaller error is kept.
    """
    mixed, sources = val_set[:1000]
    reconstruction, source1, source2, *_ = model.eval()(mixed)
    model.variance.copy_(F.mse_loss(reconstruction, sources.mean(dim=1)))
    decoded = torch.stack([source1, source2], dim=1)  # (N, 2, 784)
    if F.mse_loss(decoded.flip(1), sources) < F.mse_loss(decoded, sources):
        model.decoder1, model.decoder2 = model.decoder2, model.decoder1
        for parameter in model.encoder[-1].parameters():  # rows: mean1, logvar1, mean2, logvar2
            parameter.data = parameter.data.roll(len(parameter) // 2, dims=0)


@torch.no_grad()
def separate(model, mixed, noise=0.0):
    """Estimate the sources of mixtures: (B, 784) to (B, 2, 784) in [0, 1], digit first, the same answer every time.

    Unlike the decoders, it looks at the mixture again. First, up to 20 steps of Adam refine the two means: they
    minimise |mixed - reconstruction|^2 / (2 variance + 2 noise^2) + |z|^2 / 2 (semi-amortised inference, Kim et al.
    2018). Then the residual 2 mixed - source1 - source2 is distributed over the two sources, pixel by pixel, in
    proportion to their uncertainty (mixture consistency, after Wisdom et al. 2019), less the share that is due to the
    noise in `mixed`, whose standard deviation is `noise`.
    """
    was_training = model.training
    model.eval()
    mean1, logvar1, mean2, logvar2 = model.encoder(mixed)
    z, std = torch.stack([mean1, mean2]), (torch.stack([logvar1, logvar2]) / 2).exp()  # (2, B, latent)
    adam = torch.optim.Adam([z.requires_grad_()], lr=0.06)
    for _ in range(round(20 * max(0, 1 - 5 * noise))):  # early stopping: more steps would fit the noise
        with torch.enable_grad():
            error = (mixed - model.decode(*z)[0]).square().sum() / (model.variance + noise ** 2)
            z.grad, = torch.autograd.grad((error + z.square().sum()) / 2, z)
        adam.step()
    decoded = torch.stack(model.decode(*z)[1:], dim=1)  # (B, 2, 784)
    # The uncertainty is the geometric mean of a pixel's variance over the posterior and of s (1 - s), the variance of a
    # pixel that is black or white. All images share the draws: no answer depends on what else is in the batch.
    draws = torch.randn(8, 2, 1, z.shape[-1], generator=torch.Generator().manual_seed(0)).to(z.device)
    spread = torch.stack([torch.stack(model.decode(*(z + std * draw))[1:], dim=1) for draw in draws]).var(dim=0)
    uncertainty = ((spread + 1e-5) * (decoded * (1 - decoded) + 1e-3)).sqrt()
    share = uncertainty / (uncertainty.sum(dim=1, keepdim=True) + 4 * noise ** 2)
    model.train(was_training)
    total = 2 * mixed  # digit + garment
    sources = decoded + share * (total - decoded.sum(dim=1)).unsqueeze(1)
    if noise:
        return sources.clamp(0, 1)
    digit = sources[:, 0].clamp((total - 1).clamp(min=0), total.clamp(max=1))  # keeps total - digit in [0, 1] as well
    return torch.stack([digit, total - digit], dim=1)


def print_psnr(model, test_set):
    """Print the PSNR, 10 log10(1 / MSE), of sources and mixture as decoded, and of the sources after `separate`."""
    errors = {"decoded": [], "separated": []}  # mean squared errors: digit, garment, mixture
    for mixed, sources in make_loader(test_set, 250):
        with torch.no_grad():
            reconstruction, *decoded = model.eval()(mixed)[:3]
        truth = torch.stack([*sources.unbind(dim=1), sources.mean(dim=1)], dim=1)  # (B, 3, 784)
        errors["decoded"].append((torch.stack([*decoded, reconstruction], dim=1) - truth).square().mean(dim=2))
        errors["separated"].append((separate(model, mixed, test_set.noise) - sources).square().mean(dim=2))
    print(f"\n{len(test_set):,} test pairs, PSNR in dB of the pooled error (in brackets: mean of the images' PSNRs)")
    print("                    digit         garment         mixture")
    for name, mse in errors.items():
        pooled, each = (-10 * torch.log10(e) for e in (torch.cat(mse).mean(dim=0), torch.cat(mse)))
        print(f"{name:9}" + "".join(f"{a:9.2f} ({b:.2f})" for a, b in zip(pooled.tolist(), each.mean(dim=0).tolist())))


def draw_grid(images, titles, captions=()):
    """A figure of images (rows, columns, 784) on one grey scale, 0 to 1, with a title a column and a caption a row."""
    figure = Figure(figsize=(1.5 * images.shape[1] + bool(captions), 1.5 * len(images) + 0.4), layout="constrained")
    axes = figure.subplots(*images.shape[:2], squeeze=False)
    for ax, image in zip(axes.flat, images.reshape(-1, 28, 28).cpu().numpy()):
        ax.imshow(image, cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[], frame_on=False)
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=9)
    for ax, caption in zip(axes[:, 0], captions):
        ax.set_ylabel(caption, rotation=0, ha="right", va="center")
    return figure


@torch.no_grad()
def draw_figures(model, train_set, test_set, train_losses, val_losses):
    """The figures by file name: losses, results and separation of test mixtures, samples of the training data."""
    loss = Figure(figsize=(7, 4.5), layout="constrained")
    ax, best = loss.subplots(), min(val_losses)
    for losses, label in ((train_losses, "training (latents sampled)"), (val_losses, "validation (latent means)")):
        ax.plot(range(1, len(losses) + 1), losses, ".-", label=label)
    ax.plot(val_losses.index(best) + 1, best, "ko", markersize=12, fillstyle="none", label="best epoch")
    ax.set(xlabel="epoch", ylabel="loss (nats per image, up to a constant)")
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    ax.legend()

    mixed, sources = test_set[:8]
    reconstruction, digit, garment, *_ = model.eval()(mixed)
    results = draw_grid(torch.stack([reconstruction, garment, digit, mixed], dim=1),
                        ["Reconstructed image", "Fashion image", "Number image", "Main image"])
    digit2, garment2 = separate(model, mixed, test_set.noise).unbind(dim=1)
    separation = draw_grid(
        torch.stack([mixed, digit, digit2, sources[:, 0], garment, garment2, sources[:, 1]], dim=1),
        ["Mixture", *(f"{name},\n{how}" for name in ("Digit", "Garment") for how in ("decoded", "separated", "truth"))])

    chosen = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(0))[:8].tolist()
    mixed, sources = train_set[chosen]
    columns = [*sources.unbind(dim=1), sources.mean(dim=1)] + [mixed] * bool(train_set.noise)
    captions = [f"{digit} + {FashionMNIST.classes[garment]}" for digit, garment in train_set.labels[chosen].tolist()]
    samples = draw_grid(torch.stack(columns, dim=1), ["Digit", "Garment", "Mixture", "Noisy mixture"], captions)
    return {"loss.png": loss, "results.png": results, "samples.png": samples, "separation.png": separation}


def number(kind, low, high):
    """An argparse type: a number of `kind` from `low` to `high`."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)
    parse.__name__ = f"{kind.__name__} from {low} to {high}"  # argparse names it where it reports a ValueError
    return parse


def usable_device(name):
    """An argparse type: a device that works here; "auto" is the accelerator if there is one, else the CPU."""
    auto = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = auto if name == "auto" else torch.device(name)
        torch.zeros(1, device=device).item()
        return device
    except Exception:  # its kind depends on the device and on how torch was built
        usable = ", ".join(sorted({"auto", "cpu", auto.type}))
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here; what can: {usable}") from None


def run(args):
    """Train, measure, draw, save. Returns 0; or 1 after divergence and 130 after Ctrl-C, with the best so far saved."""
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # a folder that cannot be written fails now, not after training
    torch.manual_seed(args.seed)
    train_set, val_set, test_set = (MixMNIST(args.data, s, args.noise, args.device) for s in ("train", "val", "test"))
    train_data, val_data = make_loader(train_set, args.batch_size, shuffle=True), make_loader(val_set, 500)

    def train(model, epochs):
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.95), fused=True)
        return train_model(model, train_data, VAELoss(args.supervised), optimizer, epochs, val_data, args.device)

    # Blind training can get caught where both decoders draw a bit of everything. The loss shows it, without a look at
    # any source: so three models start with an epoch each, and the one with the lowest validation loss goes on.
    print("three starts:")
    starts = [VAE().to(args.device) for _ in range(3)]
    start_losses = [train(model, epochs=1)[1][0] for model in starts]
    model = starts[start_losses.index(min(start_losses))]
    print("the best of them goes on, with the schedule from its beginning:")
    train_losses, val_losses = train(model, args.epochs)
    status = 1 if len(train_losses) > len(val_losses) else 130 if len(val_losses) < args.epochs else 0
    finish(model, val_set)
    print_psnr(model, test_set)
    figures, state = draw_figures(model, train_set, test_set, train_losses, val_losses), io.BytesIO()
    torch.save(model.cpu().state_dict(), state)  # in memory: on a full disk, torch.save's own error is no OSError
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".mixvae-") as folder:  # an earlier run's files go last
        Path(folder, "mixvae.pt").write_bytes(state.getvalue())
        for name, figure in figures.items():
            figure.savefig(Path(folder, name), bbox_inches="tight")
        written = sorted(path.replace(args.out / path.name) for path in Path(folder).iterdir())
    print("\nwritten:", *written)
    return status


def main(argv=None):
    """The command line. Returns the exit status: 0, 1 after a fault, 130 after Ctrl-C; wrong flags exit with 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, kind, default, text in (
            ("epochs", number(int, 1, 10 ** 6), 20, "passes over the training pairs, after the three starts"),
            ("device", usable_device, "auto", "cpu, cuda, mps, ...; auto: the accelerator if there is one, else cpu"),
            ("noise", number(float, 0, 1), 0.0, "standard deviation of the noise added to the mixtures"),
            ("batch-size", number(int, 2, 60000), 256, "mixtures per training step"),
            ("lr", number(float, 1e-9, 1e30), 8e-3, "highest learning rate"),
            ("seed", number(int, 0, 2 ** 63 - 1), 0, "seed of the weights, the batches and the noise in training"),
            ("data", Path, Path("data"), "data folder; what is missing there is downloaded"),
            ("out", Path, Path("results"), "folder for the model and the figures")):
        parser.add_argument(f"--{flag}", type=kind, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--supervised", action="store_true", help="let the loss see the sources too (default: blind)")
    args = parser.parse_args(argv)
    socket.setdefaulttimeout(10)  # for a download that stalls
    torch.set_float32_matmul_precision("medium")  # bf16 products with fp32 sums, or TF32, where the hardware has them
    try:
        return run(args)
    except (OSError, FloatingPointError) as error:
        status, message = 1, error
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    print(f"mixvae: {message} (nothing is saved in {args.out})", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a console need not have the letters of a path
    sys.exit(main())
