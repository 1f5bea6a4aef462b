"""Blind source separation by a variational autoencoder, trained on mixtures alone.

Each input is the average of one MNIST digit and one Fashion-MNIST garment. One encoder
gives two Gaussian latents, two decoders give two images, and the loss looks only at
their average. `python mixvae.py --epochs 20` takes a minute on two cores; `separate`
then finds the sources of test mixtures with a PSNR of 26 dB (README.md).
"""

import copy
import math
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import MNIST, FashionMNIST

PIXELS = 28 * 28
LATENT = 32


# ---- data ----------------------------------------------------------------------------
def mix(image1, image2):
    """The mixing rule: the average of two images."""
    return (image1 + image2) / 2


class MixMNIST(Dataset):
    """Mixtures of digit i of MNIST and garment i of Fashion-MNIST.

    An index (an int, a slice or a list of ints) gives mixed, digit and garment, (784,)
    or (B, 784) each. The sources are in [0, 1]; `mixed` has Gaussian noise of standard
    deviation `noise`, drawn anew each time. `labels`, (N, 2): the classes. `split`:
    "train", "val" (the last 5,000 training pairs), "test". Raises OSError without data.
    """

    def __init__(self, root="data", split="train", noise=0.0, device="cpu"):
        try:
            mnist = MNIST(root, train=split != "test", download=True)
            fashion = FashionMNIST(root, train=split != "test", download=True)
        except Exception as error:  # of many kinds: no network, a damaged file, ...
            raise OSError(f"no data in {root} (see README.md): {error!r}") from error
        parts = {"train": slice(-5000), "val": slice(-5000, None), "test": slice(None)}
        part = parts[split]
        self.digits = mnist.data[part].flatten(1).to(device)  # (N, 784), uint8
        self.garments = fashion.data[part].flatten(1).to(device)
        self.labels = torch.stack([mnist.targets[part], fashion.targets[part]], dim=1)
        self.noise = noise

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, index):
        digit = self.digits[index] / 255
        garment = self.garments[index] / 255
        mixed = mix(digit, garment)
        if self.noise > 0:
            mixed = mixed + self.noise * torch.randn_like(mixed)
        return mixed, digit, garment

    __getitems__ = __getitem__  # a DataLoader passes it a list of indices


# ---- model ---------------------------------------------------------------------------
def hidden(n_in, n_out):
    """A hidden layer, (B, n_in) to (B, n_out); batch norm has the bias."""
    linear = nn.Linear(n_in, n_out, bias=False)
    return nn.Sequential(linear, nn.BatchNorm1d(n_out), nn.ReLU())


class Encoder(nn.Module):
    """Mixtures (B, 784) to mean1, logvar1, mean2, logvar2, (B, 32) each."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(hidden(PIXELS, 512), hidden(512, 256))
        self.head1 = nn.Linear(256, 2 * LATENT)
        self.head2 = nn.Linear(256, 2 * LATENT)

    def forward(self, mixed):
        features = self.body(mixed)  # (B, 256)
        mean1, logvar1 = self.head1(features).chunk(2, dim=1)
        mean2, logvar2 = self.head2(features).chunk(2, dim=1)
        return mean1, logvar1, mean2, logvar2


class Decoder(nn.Module):
    """Latents (B, 32) to images (B, 784) in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(hidden(LATENT, 256), hidden(256, 512))
        self.head = nn.Linear(512, PIXELS)

    def forward(self, z):
        return self.head(self.body(z)).sigmoid()


def reparameterize(mean, logvar):
    """A sample mean + std * eps, eps ~ N(0, I); gradients reach mean and logvar."""
    return mean + (logvar / 2).exp() * torch.randn_like(mean)


class VAE(nn.Module):
    """The VAE of Kingma & Welling 2014 (arxiv.org/abs/1312.6114) with two decoders."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.decoder1 = Decoder()
        self.decoder2 = Decoder()

    def forward(self, mixed):
        """Mixtures (B, 784) to three images (B, 784), then the encoder's outputs."""
        mean1, logvar1, mean2, logvar2 = self.encoder(mixed)
        z1 = reparameterize(mean1, logvar1) if self.training else mean1
        z2 = reparameterize(mean2, logvar2) if self.training else mean2
        decoded1, decoded2 = self.decoder1(z1), self.decoder2(z2)
        reconstruction = mix(decoded1, decoded2)
        return reconstruction, decoded1, decoded2, mean1, logvar1, mean2, logvar2


# ---- loss ----------------------------------------------------------------------------
def gaussian_nll(mse):
    """Negative log-likelihood per image in nats, up to a constant, from the MSE."""
    # With variance v: 784/2 (MSE / v + log v) + constant, least at v = MSE: there it is
    # 784/2 log(MSE) + constant. No weight to tune: sigma-VAE, arxiv.org/abs/2006.13202
    return PIXELS / 2 * mse.log()


def kl_divergence(mean, logvar):
    """KL(N(mean, var) || N(0, I)) in nats, (B, 32) to (B,): Kingma & Welling, app. B"""
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(dim=1)


class VAELoss(nn.Module):
    """The negative ELBO of mixtures, nll + kl; `supervised` adds the sources' nll."""

    def __init__(self, supervised=False):
        super().__init__()
        self.supervised = supervised

    def forward(self, outputs, digit, garment):
        """The VAE's outputs and the true sources to scalars: total loss, nll, kl."""
        reconstruction, decoded1, decoded2, mean1, logvar1, mean2, logvar2 = outputs
        # Blind: the target is the mixture, without its noise.
        nll = gaussian_nll(mse_loss(reconstruction, mix(digit, garment)))
        if self.supervised:
            nll = nll + gaussian_nll(mse_loss(decoded1, digit))
            nll = nll + gaussian_nll(mse_loss(decoded2, garment))
        kl = (kl_divergence(mean1, logvar1) + kl_divergence(mean2, logvar2)).mean()
        return nll + kl, nll, kl


# ---- training ------------------------------------------------------------------------
def train_model(model, train_data, criterion, optimizer, epochs, val_data, device):
    """Train, then restore the weights of the epoch with the lowest validation loss.

    Both data: loaders of batches (mixed, digit, garment). The optimizer: new, with the
    peak rates. Returns the training and the validation losses, one an epoch. Raises
    FloatingPointError if one is not finite, KeyboardInterrupt if no epoch is finished.
    """
    model.to(device).train()  # 1. Model initialization
    best_loss, best_state = math.inf, None
    train_losses, val_losses = [], []
    # The rates rise to their peaks for 60 % of the steps, then fall almost to 0 (one
    # cycle: Smith & Topin 2019, arxiv.org/abs/1708.07120).
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps = epochs * len(train_data)
    schedule = OneCycleLR(optimizer, peaks, steps, pct_start=0.6, cycle_momentum=False)
    print(f"epoch train loss   val loss    val nll     val kl  on {device}", flush=True)
    try:
        for epoch in range(1, epochs + 1):  # 2. Training loop
            train_loss = val_loss = val_nll = val_kl = 0
            model.train()
            for batch in train_data:  # 3. Training step
                mixed, digit, garment = (images.to(device) for images in batch)
                loss, _, _ = criterion(model(mixed), digit, garment)
                train_loss += loss.item() / len(train_data)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            model.eval()  # 4. Validation step
            with torch.no_grad():
                for batch in val_data:
                    mixed, digit, garment = (images.to(device) for images in batch)
                    loss, nll, kl = criterion(model(mixed), digit, garment)
                    val_loss += loss.item() / len(val_data)
                    val_nll += nll.item() / len(val_data)
                    val_kl += kl.item() / len(val_data)
            train_losses.append(train_loss)  # 5. Epoch summary
            val_losses.append(val_loss)
            row = f"{train_loss:10.2f} {val_loss:10.2f} {val_nll:10.2f} {val_kl:10.2f}"
            print(f"{epoch:5} {row}", flush=True)
            if not math.isfinite(train_loss + val_loss):
                raise FloatingPointError("the loss is not finite: lower --lr")
            if val_loss < best_loss:  # 6. Model checkpoint
                best_loss, best_state = val_loss, copy.deepcopy(model.state_dict())
    except KeyboardInterrupt:
        if best_state is None:
            raise
        print("Ctrl-C: training ends with the best epoch so far", flush=True)
    model.load_state_dict(best_state)
    return train_losses, val_losses


# ---- separation ----------------------------------------------------------------------
@torch.no_grad()
def put_digit_first(model, val_set):
    """Make digits source 1: swap, in place, if decoder 2 fits true digits better."""
    model.eval()
    mixed, digit, _ = val_set[:1000]
    _, decoded1, decoded2, *_ = model(mixed)
    if mse_loss(decoded2, digit) < mse_loss(decoded1, digit):
        encoder = model.encoder
        encoder.head1, encoder.head2 = encoder.head2, encoder.head1
        model.decoder1, model.decoder2 = model.decoder2, model.decoder1


@torch.enable_grad()  # even under a caller's no_grad
def separate(model, mixed, noise=0.0):
    """Estimate the sources: mixtures (B, 784) to digit, garment, (B, 784) in [0, 1].

    `noise`: the standard deviation of the noise in `mixed`. Sets the model to eval.
    """
    model.eval()
    with torch.no_grad():
        mean1, _, mean2, _ = model.encoder(mixed)
    # 1. Refine the latents, from the encoder's means towards the most probable ones,
    # after Kim et al. 2018 (arxiv.org/abs/1802.02550). The constants of this function
    # were chosen on validation pairs, whose true sources are known.
    z1 = mean1.clone().requires_grad_()
    z2 = mean2.clone().requires_grad_()
    optimizer = torch.optim.Adam([z1, z2], lr=0.2, betas=(0.7, 0.9))
    for _ in range(10):
        reconstruction = mix(model.decoder1(z1), model.decoder2(z2))
        mse = (mixed - reconstruction).square().mean(dim=1)  # (B,)
        loss = gaussian_nll(mse).sum() + (z1.square() + z2.square()).sum() / 2
        optimizer.zero_grad()
        loss.backward(inputs=[z1, z2])  # no gradients for the weights
        optimizer.step()
    with torch.no_grad():
        decoded1, decoded2 = model.decoder1(z1), model.decoder2(z2)
    # 2. Split the residual by variance: the nearer a pixel to 0.5, the less certain.
    variance1 = 0.2 * decoded1 * (1 - decoded1)
    variance2 = 0.1 * decoded2 * (1 - decoded2)
    residual = 2 * mixed - decoded1 - decoded2  # with twice the noise of `mixed`
    residual_variance = variance1 + variance2 + (2 * noise) ** 2 + 1e-9  # never 0
    separated1 = (decoded1 + residual * variance1 / residual_variance).clamp(0, 1)
    separated2 = (decoded2 + residual * variance2 / residual_variance).clamp(0, 1)
    if noise == 0:  # the two add up to 2 mixed
        separated2 = (2 * mixed - separated1).clamp(0, 1)
        separated1 = 2 * mixed - separated2
    return separated1, separated2


def psnr(estimate, truth):
    """PSNR in dB of images in [0, 1], over all their pixels: 10 log10(1 / MSE)."""
    return -10 * mse_loss(estimate, truth).log10().item()


@torch.no_grad()
def print_psnr(model, test_set):
    """Print PSNRs over all pairs; "mixture": the mixture as the estimate."""
    model.eval()
    mixed, digit, garment = test_set[:]
    decoded1, decoded2, separated1, separated2 = mixed.new_empty(4, *mixed.shape)
    for i in torch.arange(len(mixed)).split(500):  # all at once would take 2 GB
        _, decoded1[i], decoded2[i], *_ = model(mixed[i])
        separated1[i], separated2[i] = separate(model, mixed[i], test_set.noise)
    names = "mixture", "decoded", "separated"
    estimates = (mixed, mixed), (decoded1, decoded2), (separated1, separated2)
    print(f"\nPSNR in dB, {len(test_set):,} test pairs: digit, garment")
    for name, (image1, image2) in zip(names, estimates):
        print(f"{name:9} {psnr(image1, digit):10.2f} {psnr(image2, garment):10.2f}")


# ---- figures -------------------------------------------------------------------------
def draw_grid(path, titles, columns, captions=()):
    """Draw columns of images, (rows, 784) each; `captions` name the rows."""
    figure = Figure(figsize=(1.2 * len(columns), 1.2 * len(columns[0])))
    axes = figure.subplots(len(columns[0]), len(columns))
    for title, images, column in zip(titles, columns, axes.T):
        column[0].set_title(title, fontsize="medium")
        for ax, image in zip(column, images):
            ax.imshow(image.view(28, 28).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
    for ax, caption in zip(axes[:, 0], captions):
        ax.set_ylabel(caption, rotation="horizontal", ha="right", va="center")
    figure.savefig(path, bbox_inches="tight")


def draw_samples(path, train_set):
    """Draw eight random training pairs with their classes."""
    index = torch.randperm(len(train_set))[:8].tolist()
    mixed, digit, garment = train_set[index]
    labels = train_set.labels[index].tolist()
    captions = [f"{n}, {FashionMNIST.classes[k]}" for n, k in labels]
    draw_grid(path, ["Digit", "Garment", "Mixture"], [digit, garment, mixed], captions)


@torch.no_grad()
def draw_results(out, model, test_set):
    """Draw results.png (the assignment's columns), separation.png, generated.png."""
    model.eval()
    mixed, digit, garment = test_set[:8]
    reconstruction, decoded1, decoded2, *_ = model(mixed)
    titles = ["Reconstructed\nimage", "Fashion\nimage", "Number\nimage", "Main\nimage"]
    draw_grid(out / "results.png", titles, [reconstruction, decoded2, decoded1, mixed])
    separated1, separated2 = separate(model, mixed, test_set.noise)
    titles = ["Mixture", "Digit,\ndecoded", "Digit,\nseparated", "Digit,\ntrue"]
    titles += ["Garment,\ndecoded", "Garment,\nseparated", "Garment,\ntrue"]
    columns = [mixed, decoded1, separated1, digit, decoded2, separated2, garment]
    draw_grid(out / "separation.png", titles, columns)
    z1, z2 = torch.randn(2, 8, LATENT, device=mixed.device)
    columns = [model.decoder1(z1), model.decoder2(z2)]
    draw_grid(out / "generated.png", ["Digit", "Garment"], columns)


def draw_losses(path, train_losses, val_losses):
    """Draw both losses by epoch."""
    ax = Figure(figsize=(7, 4.5)).subplots()
    epochs = range(1, len(val_losses) + 1)
    ax.plot(epochs, train_losses, ".-", label="training (latents sampled)")
    ax.plot(epochs, val_losses, ".-", label="validation (latent means)")
    ax.set(xlabel="epoch", ylabel="loss (nats per image)")
    ax.locator_params("x", integer=True, min_n_ticks=1)
    ax.legend()
    ax.figure.savefig(path, bbox_inches="tight")


# ---- command line --------------------------------------------------------------------
def parse_arguments(argv):
    """The flags; where one is wrong, the program ends with a message and status 2."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [accelerator.type, "cpu"] if accelerator else ["cpu"]
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, default=20, help="passes over the training pairs")
    add("--device", choices=devices, default=devices[0], help="where to compute")
    add("--noise", type=float, default=0.0, help="standard deviation of the noise")
    add("--supervised", action="store_true", help="let the loss see the sources too")
    add("--batch-size", type=int, default=384, help="mixtures per training step")
    add("--lr", type=float, default=0.03, help="peak learning rate; decoder 2: half")
    add("--seed", type=int, default=0, help="random seed")
    add("--data", type=Path, default="data", help="folder of the data sets")
    add("--out", type=Path, default="results", help="folder for model and figures")
    args = parser.parse_args(argv)
    if args.epochs < 1 or not 2 <= args.batch_size <= 55_000:
        parser.error("--epochs must be 1 or more, --batch-size from 2 to 55000")
    if not (0 <= args.noise <= 1 and 0 < args.lr <= 1):
        parser.error("--noise must be from 0 to 1, --lr above 0 and at most 1")
    return args


def main(argv=None):
    """Train, save, measure and draw; `argv` replaces the command line's flags."""
    args = parse_arguments(argv)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("medium")  # faster, where there is bf16 or TF32
    train_set = MixMNIST(args.data, "train", args.noise, args.device)
    val_set = MixMNIST(args.data, "val", args.noise, args.device)
    test_set = MixMNIST(args.data, "test", args.noise, args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_samples(args.out / "samples.png", train_set)
    # collate_fn: a batch is a tuple already. drop_last: batch norm needs two images.
    train_data = DataLoader(
        train_set, args.batch_size, shuffle=True, drop_last=True, collate_fn=tuple
    )
    val_data = DataLoader(val_set, 500, collate_fn=tuple)
    model = VAE()
    # With equal rates, each decoder drew parts of both sources on 12 of 30 seeds (after
    # one epoch, by true sources of validation pairs); with half the rate for one, none.
    fast = [*model.encoder.parameters(), *model.decoder1.parameters()]
    slow = [*model.decoder2.parameters()]
    groups = [{"params": fast, "lr": args.lr}, {"params": slow, "lr": args.lr / 2}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    criterion = VAELoss(args.supervised)
    train_losses, val_losses = train_model(
        model, train_data, criterion, optimizer, args.epochs, val_data, args.device
    )
    put_digit_first(model, val_set)
    torch.save(model.state_dict(), args.out / "new.pt")  # a failure keeps the old one
    (args.out / "new.pt").replace(args.out / "mixvae.pt")
    print_psnr(model, test_set)
    draw_losses(args.out / "loss.png", train_losses, val_losses)
    draw_results(args.out, model, test_set)
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, FloatingPointError) as error:
        raise SystemExit(f"mixvae: {error}") from error
