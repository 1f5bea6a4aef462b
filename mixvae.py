"""A variational autoencoder that separates a mixture of two images, trained on mixtures alone.

Each input is the average of one MNIST digit and one Fashion-MNIST garment. One encoder gives two
Gaussian latents, two decoders give two images, and the loss looks at the mixture alone (blind
source separation). The decoders discover digits and garments by themselves; 1,000 validation pairs
tell which is which, once. Test PSNR after `python mixvae.py --epochs 20`, 93 s on two AMD EPYC
cores: decoded 20.32 / 19.21 dB (digit / garment), and 26.16 dB for both by `separate`.
"""
import argparse, copy, io, pathlib, signal, socket, sys, tempfile, threading, time

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import MNIST, FashionMNIST

PIXELS, LATENT = 28 * 28, 32


# ---- data ----------------------------------------------------------------------------------------
def mix(sources):
    """The mixing rule: the average of two images, (..., 2, 784) to (..., 784)."""
    return sources.mean(dim=-2)


def fixed_normal(*shape):
    """Draws from N(0, 1), the same each time, that leave torch's own random stream alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class MixMNIST(Dataset):
    """Mixtures of digit i of MNIST and garment i of Fashion-MNIST.

    An item is `(mixed, sources)`, float32 in [0, 1]: mixed (784,), sources (2, 784), digit first;
    B indices or a slice give a batch. `split`: "train" (the first 55,000 training pairs), "val"
    (the last 5,000), "test" (10,000). `noise` is the standard deviation of Gaussian noise on
    `mixed`, drawn afresh each time for training, else fixed. OSError: the data cannot be had.
    """

    def __init__(self, root="data", split="train", noise=0.0, device="cpu"):
        try:
            digits = MNIST(root, train=split != "test", download=True)
            garments = FashionMNIST(root, train=split != "test", download=True)
        except Exception as error:  # of many kinds: no network, a damaged file, no space, ...
            raise OSError(f"no usable data: {error!r}\nDelete {root}/MNIST/raw and {root}/Fashion"
                          f"MNIST/raw where damaged, put {', '.join(dict(MNIST.resources))} of "
                          "each there, or draw a stand-in: python test_mixvae.py DIR") from error
        n_val = len(digits) // 12  # 5,000 of 60,000
        part = {"train": slice(-n_val), "val": slice(-n_val, None), "test": slice(None)}[split]
        images = torch.stack([digits.data[part], garments.data[part]], dim=1)  # (N, 2, 28, 28)
        self.images = images.flatten(2).to(device)  # (N, 2, 784), uint8
        self.noise = noise
        fixed = noise and split != "train"
        self.fixed_noise = fixed_normal(len(self), PIXELS).to(device) if fixed else None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        sources = self.images[index] / 255  # (..., 2, 784)
        mixed = mix(sources)  # (..., 784)
        if self.noise:
            noise = torch.randn_like(mixed) if self.fixed_noise is None else self.fixed_noise[index]
            mixed = (mixed + self.noise * noise).clamp(0, 1)
        return mixed, sources

    __getitems__ = __getitem__  # a whole batch at once, for a DataLoader with collate_fn=tuple


# ---- model ---------------------------------------------------------------------------------------
def layer(n_in, n_out):
    """A hidden layer, (B, n_in) to (B, n_out); batch norm brings the bias."""
    return nn.Sequential(nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU(True))


class Encoder(nn.Sequential):
    """Mixtures (B, 784) to (B, 2, 2, 32): by latent, then its mean and its log-variance."""

    def __init__(self):
        super().__init__(layer(PIXELS, 512), layer(512, 256), nn.Linear(256, 4 * LATENT),
                         nn.Unflatten(1, (2, 2, LATENT)))


class Decoder(nn.Sequential):
    """Latents (B, 32) to images (B, 784) in [0, 1]."""

    def __init__(self):
        super().__init__(layer(LATENT, 256), layer(256, 512), nn.Linear(512, PIXELS), nn.Sigmoid())


def reparameterise(mean, logvar):
    """A sample z = mean + std * eps, eps ~ N(0, I), through which gradients reach mean and std."""
    return mean + (logvar / 2).exp() * torch.randn_like(mean)


class VAE(nn.Module):
    """Kingma & Welling 2014 (arxiv.org/abs/1312.6114), but with two latents and two decoders."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder1, self.decoder2 = Encoder(), Decoder(), Decoder()

    def decode(self, z):
        """Two latents (B, 2, 32) to two sources (B, 2, 784) in [0, 1]."""
        return torch.stack([self.decoder1(z[:, 0]), self.decoder2(z[:, 1])], dim=1)

    def forward(self, mixed):
        """(B, 784) to reconstruction, sources (B, 784), mean1, logvar1, mean2, logvar2 (B, 32)."""
        mean, logvar = self.encoder(mixed).unbind(dim=2)  # (B, 2, 32) each
        sources = self.decode(reparameterise(mean, logvar) if self.training else mean)
        return mix(sources), *sources.unbind(1), mean[:, 0], logvar[:, 0], mean[:, 1], logvar[:, 1]


# ---- loss ----------------------------------------------------------------------------------------
def gaussian_nll(image, target, dim=None):
    """-log N(target | image, MSE * I) = 784/2 log(MSE) + constant, in nats per image: at most 0."""
    # The MSE of all (B, 784), or over `dim`: a decoder with this, its best variance, needs
    # no weight against the KL divergence (sigma-VAE, Rybkin et al. 2021, arxiv.org/abs/2006.13202).
    return PIXELS / 2 * (target - image).square().mean(dim).log()


def kl_divergence(mean, logvar):
    """KL(N(mean, var) || N(0, I)) in nats, (B, 32) to (B,) (Kingma & Welling 2014, appendix B)."""
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(dim=1)


class VAELoss(nn.Module):
    """The mixture's negative ELBO in nats per image, up to a constant; or plus the sources' NLL."""

    def __init__(self, supervised=False):
        super().__init__()
        self.supervised = supervised

    def forward(self, outputs, sources):
        """The model's outputs, sources (B, 2, 784) to scalars (total, reconstruction NLL, KL)."""
        reconstruction, source1, source2, mean1, logvar1, mean2, logvar2 = outputs
        # Blind: the sources enter only as their mixture, without noise. One MSE for the batch.
        nll = gaussian_nll(reconstruction, mix(sources))
        if self.supervised:
            nll = nll + gaussian_nll(source1, sources[:, 0]) + gaussian_nll(source2, sources[:, 1])
        kl = (kl_divergence(mean1, logvar1) + kl_divergence(mean2, logvar2)).mean()
        return nll + kl, nll, kl


# ---- training ------------------------------------------------------------------------------------
def train_model(model, train_data, criterion, optimizer, epochs, val_data, device, stop=None):
    """Train, then restore the weights with the lowest validation loss.

    Each group's rate is the peak of its one cycle (Smith & Topin 2019, arxiv.org/abs/1708.07120).
    Once `stop`, a threading.Event, is set, the epoch is the last. Returns each epoch's (training,
    validation) loss, means over batches. FloatingPointError: a loss is not finite.
    """
    model.to(device)  # 1. Initialisation
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], pct_start=0.6,
        total_steps=epochs * len(train_data), cycle_momentum=False)
    losses = []
    print("epoch  train loss    val loss  reconstruction     KL  seconds")
    for epoch in range(1, epochs + 1):  # 2. Loop
        start = time.perf_counter()
        train_loss = 0
        model.train()
        for mixed, sources in train_data:  # 3. Training step
            loss, _, _ = criterion(model(mixed.to(device)), sources.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            train_loss += loss.detach() / len(train_data)  # read once an epoch: no step waits
        model.eval()  # 4. Validation step: on latent means, so its total is not an ELBO
        with torch.no_grad():
            parts = [criterion(model(x.to(device)), y.to(device)) for x, y in val_data]
        val_loss, nll, kl = torch.tensor(parts).mean(dim=0).tolist()
        if not torch.isfinite(train_loss + val_loss):  # 5. Epoch summary
            raise FloatingPointError(f"the loss is not finite in epoch {epoch}: lower --lr")
        losses.append((train_loss.item(), val_loss))
        best = val_loss == min(value for _, value in losses)
        print(f"{epoch:5}  {train_loss:10.2f}  {val_loss:10.2f}  {nll:14.2f}  {kl:5.1f}"
              f"  {time.perf_counter() - start:7.2f}{'  best' if best else ''}")
        if best:  # 6. Checkpoint
            best_state = copy.deepcopy(model.state_dict())
        if stop and stop.is_set():
            break
    model.load_state_dict(best_state)
    return losses


@torch.no_grad()
def put_digit_first(model, val_set):
    """Swap latents and decoders, in place, if the error on 1,000 validation pairs is then lower."""
    mixed, sources = val_set[:1000]
    decoded = torch.stack(model.eval()(mixed)[1:3], dim=1)  # (1000, 2, 784)
    if (decoded.flip(1) - sources).square().sum() < (decoded - sources).square().sum():
        model.decoder1, model.decoder2 = model.decoder2, model.decoder1
        for parameter in model.encoder[-2].parameters():  # rows: mean1, logvar1, mean2, logvar2
            parameter.copy_(parameter.roll(2 * LATENT, dims=0))


# ---- separation ----------------------------------------------------------------------------------
@torch.no_grad()
def separate(model, mixed, noise=0.0):
    """Estimate the sources of mixtures, (B, 784) to (B, 2, 784) in [0, 1], digit first.

    Below noise 0.2, ten steps of Adam refine the latent means on each image's own loss, where the
    means' part of the KL divergence is |z|^2 / 2 (after Kim et al. 2018, arxiv.org/abs/1802.02550).
    Then the residual 2 mixed - source1 - source2, but for the part of noise of standard deviation
    `noise`, is shared out by uncertainty (after Wisdom et al. 2019, arxiv.org/abs/1811.08521).
    """
    was_training = model.training
    z, logvar = model.eval().encoder(mixed).unbind(dim=2)  # (B, 2, 32) each
    adam = torch.optim.Adam([z.requires_grad_()], lr=0.2, betas=(0.7, 0.9))
    for _ in range(10 if noise < 0.2 else 0):  # else they would fit the noise
        with torch.enable_grad():
            loss = gaussian_nll(mix(model.decode(z)), mixed, dim=1).sum() + z.square().sum() / 2
        z.grad = torch.autograd.grad(loss, z)[0]  # leaves no gradients in the decoders
        adam.step()
    # A pixel's uncertainty is the geometric mean of two variances: of eight draws around z, and of
    # a black or white pixel, decoded (1 - decoded). A heuristic, chosen on validation pairs.
    eps = (logvar / 2).exp() * fixed_normal(8, 1, 2, LATENT).to(mixed.device)  # (8, B, 2, 32)
    decoded = model.decode(z)  # (B, 2, 784)
    variance = torch.stack([model.decode(z + e) - decoded for e in eps]).square().mean(dim=0)
    model.train(was_training)
    uncertainty = ((variance + 1e-5) * (decoded * (1 - decoded) + 1e-3)).sqrt()  # (B, 2, 784)
    share = uncertainty / (uncertainty.sum(dim=1, keepdim=True) + 4 * noise**2)  # in 2 mixed
    total = 2 * mixed  # digit + garment
    sources = decoded + share * (total - decoded.sum(dim=1)).unsqueeze(1)
    digit = sources[:, 0].clamp((total - 1).clamp(min=0), total.clamp(max=1))  # garment too
    return sources.clamp(0, 1) if noise else torch.stack([digit, total - digit], dim=1)


@torch.no_grad()
def print_psnr(model, test_set):
    """Print both sources' PSNR, 10 log10(1 / MSE over all pairs); "mixture": the input itself."""
    error = 0
    for mixed, sources in DataLoader(test_set, 200, collate_fn=tuple):
        decoded = torch.stack(model.eval()(mixed)[1:3], dim=1)  # (B, 2, 784)
        images = mixed[:, None].expand_as(decoded), decoded, separate(model, mixed, test_set.noise)
        error += (torch.stack(images) - sources).square().mean(dim=3).sum(dim=1)  # (3, 2)
    psnr = -10 * (error / len(test_set)).log10()
    print(f"\nPSNR in dB, {len(test_set):,} test pairs\n             digit  garment")
    for name, (digit, garment) in zip(["mixture", "decoded", "separated"], psnr):
        print(f"{name:9}  {digit:7.2f}  {garment:7.2f}")


# ---- figures -------------------------------------------------------------------------------------
@torch.no_grad()
def prepare_images(model, train_set, test_set):
    """Each file's columns, title to images (8, 784) in [0, 1]; results.png as the homework asks."""
    mixed, truth = test_set[:8]
    reconstruction, digit, garment, *_ = model.eval()(mixed)
    digit2, garment2 = separate(model, mixed, test_set.noise).unbind(dim=1)
    new = model.decode(fixed_normal(8, 2, LATENT).to(mixed.device))
    mixture, sources = train_set[:8]
    return {"results.png": {"Reconstructed image": reconstruction, "Fashion image": garment,
                            "Number image": digit, "Main image": mixed},
            "separation.png": {"Mixture": mixed, "Digit decoded": digit, "Digit separated": digit2,
                               "Digit truth": truth[:, 0], "Garment decoded": garment,
                               "Garment separated": garment2, "Garment truth": truth[:, 1]},
            "generated.png": {"Digit": new[:, 0], "Garment": new[:, 1], "Mixture": mix(new)},
            "samples.png": {"Digit": sources[:, 0], "Garment": sources[:, 1], "Mixture": mixture}}


def draw_columns(columns):
    """A figure of columns, title to images (rows, 784), all on one grey scale."""
    axes = Figure(figsize=(1.45 * len(columns), 12), layout="constrained").subplots(1, len(columns))
    for ax, (title, images) in zip(axes, columns.items()):
        ax.imshow(images.reshape(-1, 28).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
        ax.set(title=title.replace(" ", "\n"), xticks=[], yticks=[], frame_on=False)
    return axes[0].figure


def draw_losses(losses):
    """A figure of the (training, validation) losses by epoch."""
    ax = Figure(figsize=(7, 4.5), layout="constrained").subplots()
    epochs = range(1, len(losses) + 1)
    ax.plot(epochs, losses, ".-", label=["training (latents sampled)", "validation (latent means)"])
    ax.axvline(min(epochs, key=lambda i: losses[i - 1][1]), c="grey", ls=":", label="best epoch")
    ax.set(xlabel="epoch", ylabel="loss (nats per image)", xticks=epochs[::1 + len(losses) // 25])
    ax.legend()
    return ax.figure


def save(path, write):
    """Write a file by `write(buffer)`: completely or, where that fails, not at all."""
    buffer = io.BytesIO()
    write(buffer)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = pathlib.Path(folder, path.name)
        part.write_bytes(buffer.getvalue())
        part.replace(path)
    print(f"written: {path}")


# ---- command line --------------------------------------------------------------------------------
def main(argv=None):
    """Train, save, measure, draw. Returns 0, after Ctrl-C in training 130; wrong flags exit with 2.

    Once the model is saved, older figures are removed. Raises OSError, FloatingPointError.
    """
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description=__doc__.splitlines()[0])
    fastest = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    add = parser.add_argument
    add("--epochs", type=int, default=20, help="passes over the training pairs")
    add("--device", choices=sorted({"auto", "cpu", fastest.type}), default="auto", help="auto: GPU")
    add("--noise", type=float, default=0.0, help="standard deviation of noise on mixtures")
    add("--supervised", action="store_true", help="let the loss see the sources too")
    add("--batch-size", type=int, default=384, help="mixtures per training step")
    add("--lr", type=float, default=0.03, help="highest learning rate; decoder 2: half of it")
    add("--seed", type=int, default=0, help="of all that is random in training")
    add("--data", type=pathlib.Path, default="data", help="folder; what is missing is downloaded")
    add("--out", type=pathlib.Path, default="results", help="folder for the model and the figures")
    args = parser.parse_args(argv)
    if not (args.epochs > 0 and 0 <= args.noise <= 1 and args.batch_size > 1 and 0 < args.lr <= 1):
        parser.error("allowed: --epochs 1.., --batch-size 2.., --noise 0..1, --lr above 0 up to 1")
    device = torch.device("cpu") if args.device == "cpu" else fastest
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # a folder that cannot be written fails now
    socket.setdefaulttimeout(10)  # seconds, for a download that stalls
    torch.set_float32_matmul_precision("medium")  # bf16 or TF32 products, where the device has them
    torch.manual_seed(args.seed)
    train_set, val_set, test_set = (MixMNIST(args.data, split, args.noise, device)
                                    for split in ("train", "val", "test"))
    batch_size = min(args.batch_size, len(train_set))
    train_data = DataLoader(train_set, batch_size, shuffle=True, drop_last=True, collate_fn=tuple)
    # A generator of its own: validation must not shift the random numbers of training.
    val_data = DataLoader(val_set, 500, collate_fn=tuple, generator=torch.Generator())
    model = VAE().to(device)
    # Two decoders that learn alike may each take up a bit of both sources, and some starts stay so.
    # At half the rate, decoder 2 leaves the digits to decoder 1 (put_digit_first checks it).
    faster = {"params": [*model.encoder.parameters(), *model.decoder1.parameters()]}
    slower = {"params": model.decoder2.parameters(), "lr": args.lr / 2}
    optimizer = torch.optim.Adam([faster, slower], args.lr, betas=(0.9, 0.95), fused=True)
    print(f"mixvae: {device}, {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{len(train_set):,} training, {len(val_set):,} validation and {len(test_set):,} test "
          f"pairs, {'supervised' if args.supervised else 'blind'}, noise {args.noise}")
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())  # Ctrl-C: the epoch is the last
    losses = train_model(model, train_data, VAELoss(args.supervised), optimizer, args.epochs,
                         val_data, device, stop)
    put_digit_first(model, val_set)
    save(args.out / "mixvae.pt", lambda file: torch.save(model.state_dict(), file))
    for name in "loss.png", "results.png", "separation.png", "generated.png", "samples.png":
        (args.out / name).unlink(missing_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on it ends at once
    print_psnr(model, test_set)
    save(args.out / "loss.png", draw_losses(losses).savefig)
    for name, columns in prepare_images(model, train_set, test_set).items():
        save(args.out / name, draw_columns(columns).savefig)
    return 130 if stop.is_set() else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # live, in any console
    try:
        sys.exit(main())
    except (OSError, FloatingPointError) as error:
        sys.exit(f"mixvae: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
