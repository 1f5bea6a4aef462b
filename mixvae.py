"""Blind source separation by a variational autoencoder (VAE).

Each input is the average of one MNIST digit and one Fashion-MNIST garment. One encoder
gives two Gaussian latents, two decoders give two images; the loss looks at the mixture
alone (unless --supervised). `python mixvae.py --epochs 20` separates with 26 dB PSNR.
"""

import copy
import math
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn, optim
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from torchvision.datasets import MNIST, FashionMNIST
from torchvision.utils import make_grid

LATENT = 32
SIGMA = 0.1  # standard deviation of a mixture's (if supervised, also a source's) pixel


# ---- data ----------------------------------------------------------------------------
def mix(image1, image2):
    """The mixing rule: the average of two images."""
    return (image1 + image2) / 2


class MixMNIST(Dataset):
    """Mixtures of digit i of MNIST and garment i of Fashion-MNIST.

    An int gives mixed, digit, garment, (784,) each; a slice or a list of ints gives a
    batch, (B, 784) each. Pixels are in [0, 1], before `mixed` gets Gaussian noise with
    standard deviation `noise`. `labels`, (N, 2): the classes. `split`: "train", "val"
    (the last 5,000 training pairs) or "test". Raises OSError without data.
    """

    def __init__(self, root="data", split="train", noise=0.0, device="cpu"):
        try:
            mnist = MNIST(root, train=split != "test", download=True)
            fashion = FashionMNIST(root, train=split != "test", download=True)
        except Exception as error:  # no network, a damaged file, ...
            raise OSError(f"no data in {root} (see README.md): {error!r}") from error
        cut = {"train": slice(0, -5000), "val": slice(-5000, None), "test": slice(None)}
        part = cut[split]
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


# ---- model ---------------------------------------------------------------------------
def hidden(n_in, n_out):
    """A hidden layer, (B, n_in) to (B, n_out)."""
    linear = nn.Linear(n_in, n_out, bias=False)  # batch norm has a bias
    return nn.Sequential(linear, nn.BatchNorm1d(n_out), nn.ReLU())


class Encoder(nn.Module):
    """Mixtures (B, 784) to mean1, logvar1, mean2, logvar2, (B, 32) each."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(hidden(784, 512), hidden(512, 256))
        self.head = nn.Linear(256, 4 * LATENT)

    def forward(self, mixed):
        return self.head(self.body(mixed)).chunk(4, dim=1)


class Decoder(nn.Module):
    """Latents (B, 32) to images (B, 784) in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(hidden(LATENT, 256), hidden(256, 512))
        self.head = nn.Linear(512, 784)

    def forward(self, z):
        return self.head(self.body(z)).sigmoid()


def reparameterize(mean, logvar):
    """A sample of N(mean, exp(logvar)); gradients reach both mean and logvar."""
    std = (logvar / 2).exp()
    return mean + std * torch.randn_like(std)


class VAE(nn.Module):
    """The VAE of Kingma & Welling 2014 (arxiv.org/abs/1312.6114) with two decoders."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.decoder1 = Decoder()
        self.decoder2 = Decoder()
        # Decoder 1 starts darker, sigmoid(-1) = 0.27 instead of 0.5, and so takes the
        # digits, which are mostly black: measured (README.md), not proven.
        nn.init.constant_(self.decoder1.head.bias, -1)

    def forward(self, mixed):
        """Mixtures (B, 784) to three images (B, 784), then the encoder's outputs."""
        mean1, logvar1, mean2, logvar2 = self.encoder(mixed)
        z1 = reparameterize(mean1, logvar1) if self.training else mean1
        z2 = reparameterize(mean2, logvar2) if self.training else mean2
        decoded1, decoded2 = self.decoder1(z1), self.decoder2(z2)
        reconstruction = mix(decoded1, decoded2)
        return reconstruction, decoded1, decoded2, mean1, logvar1, mean2, logvar2


# ---- loss ----------------------------------------------------------------------------
def reconstruction_loss(image, target, noise=0.0):
    """Squared error over twice the variance, (B, 784) to (B,), in nats.

    It is -log N(target; image, variance I) without its constant, which depends on the
    variance. `noise`: the standard deviation of the noise in `target`.
    """
    variance = SIGMA**2 + noise**2
    squared_error = nn.functional.mse_loss(image, target, reduction="none").sum(dim=1)
    return squared_error / (2 * variance)


def kl_divergence(mean, logvar):
    """KL(N(mean, var) || N(0, I)) in nats, (B, 32) to (B,). Kingma & Welling, app. B"""
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(dim=1)


class VAELoss(nn.Module):
    """Reconstruction loss + KL divergence, in training the negative ELBO + a constant.

    Digit and garment are used only if `supervised`. `noise`: as in MixMNIST.
    """

    def __init__(self, noise=0.0, supervised=False):
        super().__init__()
        self.noise = noise
        self.supervised = supervised

    def forward(self, outputs, mixed, digit, garment):
        """Total, reconstruction loss and KL divergence: scalars, means of the batch."""
        reconstruction, decoded1, decoded2, mean1, logvar1, mean2, logvar2 = outputs
        recon_loss = reconstruction_loss(reconstruction, mixed, self.noise)
        if self.supervised:  # the sources have no noise
            recon_loss = recon_loss + reconstruction_loss(decoded1, digit)
            recon_loss = recon_loss + reconstruction_loss(decoded2, garment)
        kl = kl_divergence(mean1, logvar1) + kl_divergence(mean2, logvar2)
        return (recon_loss + kl).mean(), recon_loss.mean(), kl.mean()


# ---- training ------------------------------------------------------------------------
def train_model(model, train_data, criterion, optimizer, epochs, val_data, device):
    """Train, then restore the weights of the epoch with the lowest validation loss.

    Both data: batches (mixed, digit, garment). Returns two lists, the training and the
    validation losses by epoch, in nats. Raises FloatingPointError if one is not finite.
    """
    model.to(device).train()  # 1. Model initialization
    min_loss, best_state = math.inf, copy.deepcopy(model.state_dict())
    train_losses, val_losses = [], []
    # The learning rate rises to its peak for 75 % of the steps, then falls almost to 0
    # (one cycle: Smith & Topin 2019, arxiv.org/abs/1708.07120).
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps = epochs * len(train_data)
    schedule = optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peaks, total_steps=steps, pct_start=0.75, cycle_momentum=False
    )
    print(f"epoch train loss   val loss  val recon     val KL  on {device}", flush=True)
    for epoch in range(1, epochs + 1):  # 2. Training loop
        train_loss = val_loss = val_recon_loss = val_kl = 0
        model.train()
        for batch in train_data:  # 3. Training step
            mixed, digit, garment = [images.to(device) for images in batch]
            loss, _, _ = criterion(model(mixed), mixed, digit, garment)
            train_loss += loss.item() / len(train_data)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()  # 4. Validation step
        with torch.no_grad():
            for batch in val_data:
                mixed, digit, garment = [images.to(device) for images in batch]
                loss, recon_loss, kl = criterion(model(mixed), mixed, digit, garment)
                val_loss += loss.item() / len(val_data)
                val_recon_loss += recon_loss.item() / len(val_data)
                val_kl += kl.item() / len(val_data)
        train_losses.append(train_loss)  # 5. Epoch summary
        val_losses.append(val_loss)
        row = [train_loss, val_loss, val_recon_loss, val_kl]
        print(f"{epoch:5}", *[f"{value:10.2f}" for value in row], flush=True)
        if not math.isfinite(train_loss + val_loss):
            raise FloatingPointError("the loss is not finite: lower --lr")
        # 6. Model checkpoint. Validation decodes the means, so its loss is no ELBO.
        if val_loss < min_loss:
            min_loss, best_state = val_loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return train_losses, val_losses


# ---- separation: beyond the assignment -----------------------------------------------
def refine(model, mixed, noise):
    """The weights stay fixed; only z1 and z2, (B, 32) each, are optimized and returned.

    They approach the most probable latents of `mixed`, (B, 784). Sets evaluation mode.
    In the spirit of Kim et al. 2018, arxiv.org/abs/1802.02550.
    """
    model.eval()
    with torch.no_grad():
        mean1, _, mean2, _ = model.encoder(mixed)
    z1 = mean1.clone().requires_grad_()
    z2 = mean2.clone().requires_grad_()
    optimizer = optim.Adam([z1, z2], lr=0.2, betas=(0.7, 0.9))  # betas for few steps
    with torch.enable_grad():  # `separate` turns gradients off
        for _ in range(10):
            reconstruction = mix(model.decoder1(z1), model.decoder2(z2))
            recon_loss = reconstruction_loss(reconstruction, mixed, noise)
            prior_loss = (z1.square() + z2.square()).sum(dim=1) / 2  # -log p(z) + const
            optimizer.zero_grad()
            (recon_loss + prior_loss).sum().backward(inputs=[z1, z2])  # not the weights
            optimizer.step()
    return z1.detach(), z2.detach()


def share_residual(mixed, decoded1, decoded2, noise):
    """Divide the residual in proportion to variances; two images (B, 784) in [0, 1]."""
    residual = 2 * mixed - decoded1 - decoded2
    # The conditional mean of independent Gaussian sources. Black and white are certain,
    # 0.5 is the least certain. The factors were chosen on validation pairs.
    variance1 = 0.3 * decoded1 * (1 - decoded1)
    variance2 = 0.1 * decoded2 * (1 - decoded2)
    total = variance1 + variance2 + (2 * noise) ** 2 + 1e-9  # 1e-9 avoids 0 / 0
    separated1 = (decoded1 + residual * variance1 / total).clamp(0, 1)
    if noise > 0:
        separated2 = (decoded2 + residual * variance2 / total).clamp(0, 1)
        return separated1, separated2
    # Restore source1 + source2 = 2 mixed after clamping; both stay in [0, 1].
    separated2 = (2 * mixed - separated1).clamp(0, 1)
    return 2 * mixed - separated2, separated2


@torch.no_grad()
def separate(model, mixed, noise=0.0):
    """Estimate digit and garment, (B, 784) in [0, 1] each. `noise`: that of `mixed`."""
    z1, z2 = refine(model, mixed, noise)
    return share_residual(mixed, model.decoder1(z1), model.decoder2(z2), noise)


def psnr(estimate, truth):
    """PSNR in dB of images in [0, 1], over all their pixels: 10 log10(1 / MSE)."""
    return -10 * nn.functional.mse_loss(estimate, truth).log10().item()


@torch.no_grad()
def print_psnr(model, test_set):
    """Print PSNRs over all pairs; "mixture": the mixture as the estimate."""
    model.eval()
    mixed, digit, garment = test_set[:]
    _, decoded1, decoded2, *_ = model(mixed)
    estimates1, estimates2 = [], []
    for batch in mixed.split(500):  # 500 at a time, to save memory: gradients need it
        separated1, separated2 = separate(model, batch, test_set.noise)
        estimates1.append(separated1)
        estimates2.append(separated2)
    separated1, separated2 = torch.cat(estimates1), torch.cat(estimates2)
    print(f"\nPSNR in dB, {len(test_set):,} test pairs: digit, garment")
    print(f"mixture   {psnr(mixed, digit):8.2f} {psnr(mixed, garment):8.2f}")
    print(f"decoded   {psnr(decoded1, digit):8.2f} {psnr(decoded2, garment):8.2f}")
    print(f"separated {psnr(separated1, digit):8.2f} {psnr(separated2, garment):8.2f}")


# ---- figures -------------------------------------------------------------------------
def draw_grid(path, titles, columns, captions=()):
    """Draw columns of images, (rows, 784) each; `captions` name the rows."""
    images = torch.stack(columns, dim=1)  # (rows, columns, 784)
    grid = make_grid(images.view(-1, 1, 28, 28), nrow=len(columns), pad_value=1)
    figure = Figure(figsize=(1.3 * len(columns), 1.3 * len(images)))
    ax = figure.add_subplot(frameon=False)
    ax.imshow(grid[0].cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    ax.set_xticks(range(16, 30 * len(titles), 30), titles)  # 28 pixels, 2 of padding
    ax.set_yticks(range(16, 30 * len(captions), 30), captions)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
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
    z1 = torch.randn(8, LATENT, device=mixed.device)
    z2 = torch.randn(8, LATENT, device=mixed.device)
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
    add("--lr", type=float, default=0.03, help="peak learning rate")
    add("--seed", type=int, default=0, help="random seed")
    add("--data", type=Path, default="data", help="folder of the data sets")
    add("--out", type=Path, default="results", help="folder for model and figures")
    args = parser.parse_args(argv)
    # Batch norm needs 2 mixtures or more; a batch cannot exceed the 55,000 pairs.
    if args.epochs < 1 or not 2 <= args.batch_size <= 55_000:
        parser.error("--epochs must be 1 or more, --batch-size from 2 to 55000")
    if not (0 <= args.noise <= 1 and 0 < args.lr <= 1):
        parser.error("--noise must be from 0 to 1, --lr above 0 and at most 1")
    return args


def main(argv=None):
    """Train, save, measure and draw; `argv` replaces the command line's flags."""
    args = parse_arguments(argv)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("medium")  # less precise, can be faster
    train_set = MixMNIST(args.data, "train", args.noise, args.device)
    val_set = MixMNIST(args.data, "val", args.noise, args.device)
    test_set = MixMNIST(args.data, "test", args.noise, args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_samples(args.out / "samples.png", train_set)
    # The sampler gives a list of indices for each batch; MixMNIST takes it as it is, so
    # batch_size=None. len(train_data) counts batches.
    sampler = BatchSampler(RandomSampler(train_set), args.batch_size, drop_last=True)
    train_data = DataLoader(train_set, sampler=sampler, batch_size=None)
    val_data = [val_set[:]]  # one batch, with the same noise in every epoch
    model = VAE().to(args.device)
    optimizer = optim.Adam(model.parameters(), args.lr, betas=(0.9, 0.95), fused=True)
    criterion = VAELoss(args.noise, args.supervised)
    train_losses, val_losses = train_model(
        model, train_data, criterion, optimizer, args.epochs, val_data, args.device
    )
    # By way of new.pt, so that a save that fails leaves the old mixvae.pt.
    torch.save(model.state_dict(), args.out / "new.pt")
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
