"""A variational autoencoder that learns, from mixtures alone, to separate them.

Each input is the average of one MNIST digit and one Fashion-MNIST garment. One encoder
gives two Gaussian latents, two decoders give two images, and the loss looks only at
their average (blind source separation). `python mixvae.py --epochs 20` takes 1.5
minutes on two cores; test PSNR, the same for both sources: 26.05 dB (mixture: 13.23).
"""

import contextlib
import copy
import io
import math
import os
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import MNIST, FashionMNIST
from torchvision.utils import make_grid

# An invalid MPLBACKEND would break this import: hide it, then set it if it is valid.
with mock.patch.dict(os.environ, MPLBACKEND=""):
    from matplotlib import figure, rcParams
with contextlib.suppress(KeyError, ValueError):
    rcParams["backend"] = os.environ["MPLBACKEND"]

PIXELS = 28 * 28
LATENT = 32


# ---- data ----------------------------------------------------------------------------
def mix(image1, image2):
    """The mixing rule: the average of two images."""
    return (image1 + image2) / 2


class MixMNIST(Dataset):
    """Mixtures of digit i of MNIST and garment i of Fashion-MNIST.

    An item is (mixed, digit, garment), (784,) each, or (B, 784) for B indices, the
    sources in [0, 1]; `mixed` has Gaussian noise of deviation `noise`, anew each time.
    `labels`, (N, 2): the classes of digit and garment. `split`: "train" (the first
    55,000 training pairs), "val" (the last 5,000), "test". Raises OSError without data.
    """

    def __init__(self, root="data", split="train", noise=0.0, device="cpu"):
        try:
            mnist = MNIST(root, train=split != "test", download=True)
            fashion = FashionMNIST(root, train=split != "test", download=True)
        except Exception as error:  # of many kinds: no network, a damaged file, ...
            raise OSError(f"no data in {root} (see README.md): {error!r}") from error
        n = len(mnist.data) * 11 // 12  # 55,000 of 60,000
        part = {"train": slice(n), "val": slice(n, None), "test": slice(None)}[split]
        self.digits = mnist.data[part].flatten(1).clone().to(device)  # uint8, a copy
        self.garments = fashion.data[part].flatten(1).clone().to(device)
        self.labels = torch.stack([mnist.targets[part], fashion.targets[part]], dim=1)
        self.noise = noise

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, index):
        digit = self.digits[index] / 255
        garment = self.garments[index] / 255
        mixed = mix(digit, garment)
        if self.noise:
            mixed = mixed + self.noise * torch.randn_like(mixed)
        return mixed, digit, garment

    __getitems__ = __getitem__  # whole batches at once, for a DataLoader


# ---- model ---------------------------------------------------------------------------
def hidden(n_in, n_out):
    """A hidden layer, (B, n_in) to (B, n_out); the bias comes from batch norm."""
    linear = nn.Linear(n_in, n_out, bias=False)
    return nn.Sequential(linear, nn.BatchNorm1d(n_out), nn.ReLU(inplace=True))


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


class Decoder(nn.Sequential):
    """Latents (B, 32) to images (B, 784) in [0, 1]."""

    def __init__(self):
        layers = hidden(LATENT, 256), hidden(256, 512), nn.Linear(512, PIXELS)
        super().__init__(*layers, nn.Sigmoid())


def reparameterise(mean, logvar):
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
        """(B, 784) to 3 images (B, 784), then the encoder's outputs. Eval: z = mean."""
        mean1, logvar1, mean2, logvar2 = self.encoder(mixed)
        z1 = reparameterise(mean1, logvar1) if self.training else mean1
        z2 = reparameterise(mean2, logvar2) if self.training else mean2
        decoded1 = self.decoder1(z1)
        decoded2 = self.decoder2(z2)
        reconstruction = mix(decoded1, decoded2)
        return reconstruction, decoded1, decoded2, mean1, logvar1, mean2, logvar2


# ---- loss ----------------------------------------------------------------------------
def gaussian_nll(mse):
    """Negative log-likelihood per image in nats, less a constant: 784/2 log(MSE)."""
    # -log N(x; image, v) = 784/2 (MSE / v + log v) + constant. The best v is MSE (of a
    # batch or an image), so no weight to tune (sigma-VAE, arxiv.org/abs/2006.13202).
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
        # Blind: sources only give the target, their noiseless mixture (denoising VAE).
        nll = gaussian_nll(mse_loss(reconstruction, mix(digit, garment)))
        if self.supervised:
            nll = nll + gaussian_nll(mse_loss(decoded1, digit))
            nll = nll + gaussian_nll(mse_loss(decoded2, garment))
        kl = (kl_divergence(mean1, logvar1) + kl_divergence(mean2, logvar2)).mean()
        return nll + kl, nll, kl


# ---- training ------------------------------------------------------------------------
def train_model(model, train_data, criterion, optimizer, epochs, val_data, device):
    """Train, then restore the weights of the epoch with the lowest validation loss.

    The optimizer, new for each call, has the peak rates. Returns the training and the
    validation losses. Raises KeyboardInterrupt (in epoch 1 only), FloatingPointError.
    """
    best_loss, best_state, new_state = math.inf, None, None  # 1. Initialisation
    train_losses, val_losses = [], []
    # One cycle: for 60 % of the steps, the rate rises to its peak, to learn fast, and
    # then falls almost to 0, to settle (Smith & Topin 2019, arxiv.org/abs/1708.07120).
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps = epochs * len(train_data)
    schedule = OneCycleLR(optimizer, peaks, steps, pct_start=0.6, cycle_momentum=False)
    print(f"epoch train loss   val loss    val nll     val kl  on {device}", flush=True)
    try:
        for epoch in range(1, epochs + 1):  # 2. Loop
            model.train()  # 3. Training step
            train_loss = 0
            for batch in train_data:
                mixed, digit, garment = (images.to(device) for images in batch)
                loss, _, _ = criterion(model(mixed), digit, garment)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                train_loss += loss.item() / len(train_data)
            model.eval()  # 4. Validation step, with z = mean, so without sampling
            terms = []
            with torch.no_grad():
                for batch in val_data:
                    mixed, digit, garment = (images.to(device) for images in batch)
                    terms.append(criterion(model(mixed), digit, garment))
            val_loss, val_nll, val_kl = torch.tensor(terms).mean(dim=0).tolist()
            row = train_loss, val_loss, val_nll, val_kl  # 5. Epoch summary
            print(f"{epoch:5}", *(f"{value:10.2f}" for value in row), flush=True)
            if not math.isfinite(train_loss + val_loss):
                raise FloatingPointError("the loss is not finite: lower --lr")
            # 6. Checkpoint; only its last line sets results: Ctrl-C cannot split them
            if val_loss < best_loss:
                best_loss, new_state = val_loss, copy.deepcopy(model.state_dict())
            losses = [*train_losses, train_loss], [*val_losses, val_loss]
            (train_losses, val_losses), best_state = losses, new_state
    except KeyboardInterrupt:
        print("Ctrl-C: training ends here", flush=True)
        if best_state is None:
            raise
    model.load_state_dict(best_state)
    return train_losses, val_losses


# ---- separation ----------------------------------------------------------------------
def put_digit_first(model, val_set):
    """Make digits number 1: swap, in place, if decoder 2 fits true digits better."""
    mixed, digit, _ = val_set[:1000]
    _, decoded1, decoded2, *_ = model.eval()(mixed)
    if mse_loss(decoded2, digit) < mse_loss(decoded1, digit):
        encoder = model.encoder
        encoder.head1, encoder.head2 = encoder.head2, encoder.head1
        model.decoder1, model.decoder2 = model.decoder2, model.decoder1


@torch.no_grad()
def separate(model, mixed, noise=0.0):
    """Estimate the sources: mixtures (B, 784) to digit, garment, (B, 784) in [0, 1].

    Ten steps of Adam on z1 and z2, from the encoder's means, minimise for each mixture
    784/2 log(MSE) + (|z1|^2 + |z2|^2) / 2: a point estimate, without the KL's variances
    (after Kim et al. 2018, arxiv.org/abs/1802.02550). The residual, 2 mixed minus both
    images, is split by variance: E[source_k | mixed] of Gaussians around decoded_k.
    """
    was_training = model.training
    mean1, _, mean2, _ = model.eval().encoder(mixed)
    z1 = mean1.clone().requires_grad_()
    z2 = mean2.clone().requires_grad_()
    adam = torch.optim.Adam([z1, z2], lr=0.2, betas=(0.7, 0.9))
    for _ in range(10):
        with torch.enable_grad():
            reconstruction = mix(model.decoder1(z1), model.decoder2(z2))
            mse = (mixed - reconstruction).square().mean(dim=1)  # (B,)
            loss = gaussian_nll(mse).sum() + (z1.square() + z2.square()).sum() / 2
        z1.grad, z2.grad = torch.autograd.grad(loss, [z1, z2])  # no weight gradients
        adam.step()
    decoded1 = model.decoder1(z1)
    decoded2 = model.decoder2(z2)
    model.train(was_training)
    # A pixel that is 1 with probability p, else 0, has variance p (1 - p). The squared
    # errors left on validation pairs are 0.2 (digits) and 0.1 (garments) of it.
    variance1 = 0.2 * decoded1 * (1 - decoded1)
    variance2 = 0.1 * decoded2 * (1 - decoded2)
    residual = 2 * mixed - decoded1 - decoded2  # with twice the noise of `mixed`
    total = variance1 + variance2 + 4 * noise**2 + 1e-9  # of residual; never 0
    digit = decoded1 + residual * variance1 / total
    garment = decoded2 + residual * variance2 / total
    if not noise:  # digit + garment = 2 mixed, both in [0, 1], which bounds the digit
        digit = digit.clamp((2 * mixed - 1).clamp(min=0), (2 * mixed).clamp(max=1))
        garment = 2 * mixed - digit
    return digit.clamp(0, 1), garment.clamp(0, 1)


@torch.no_grad()
def print_psnr(model, test_set):
    """Print PSNRs, 10 log10(1 / MSE) over all pairs; "mixture": without separation."""
    errors = {"mixture": 0, "decoded": 0, "separated": 0}
    for i in range(0, len(test_set), 200):
        mixed, digit, garment = test_set[i : i + 200]
        _, decoded1, decoded2, *_ = model.eval()(mixed)
        estimates = {"mixture": (mixed, mixed), "decoded": (decoded1, decoded2)}
        estimates["separated"] = separate(model, mixed, test_set.noise)
        truth = torch.stack([digit, garment])  # (2, B, 784)
        for name, estimate in estimates.items():
            errors[name] += (torch.stack(estimate) - truth).square().sum(dim=(1, 2))
    print(f"\nPSNR in dB, {len(test_set):,} test pairs: digit, garment")
    for name, error in errors.items():
        psnr1, psnr2 = -10 * (error / len(test_set) / PIXELS).log10()
        print(f"{name:9} {psnr1:10.2f} {psnr2:10.2f}", flush=True)


# ---- figures -------------------------------------------------------------------------
def draw_grid(path, titles, columns, captions=()):
    """Draw columns of images, (rows, 784) each; `captions` name the rows."""
    images = torch.stack(columns, dim=1).reshape(-1, 1, 28, 28)  # row by row
    grid = make_grid(images, nrow=len(columns), padding=2, pad_value=1)  # (3, H, W)
    ax = figure.Figure(figsize=(1.3 * len(columns), 1.3 * len(columns[0]))).subplots()
    ax.imshow(grid[0].cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    ax.set_xticks([16 + 30 * i for i in range(len(titles))], titles)  # 28 + 2 pixels
    ax.set_yticks([16 + 30 * i for i in range(len(captions))], captions)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.set_frame_on(False)
    ax.figure.savefig(path, bbox_inches="tight")


@torch.no_grad()
def draw_figures(out, model, train_set, test_set):
    """Draw test pairs, images from the prior, and training pairs with their classes."""
    mixed, digit, garment = test_set[:8]
    reconstruction, decoded1, decoded2, *_ = model.eval()(mixed)
    titles = ["Reconstructed\nimage", "Fashion\nimage", "Number\nimage", "Main\nimage"]
    draw_grid(out / "results.png", titles, [reconstruction, decoded2, decoded1, mixed])
    separated1, separated2 = separate(model, mixed, test_set.noise)
    columns = [mixed, decoded1, separated1, digit, decoded2, separated2, garment]
    titles = ["Mixture", *["decoded", "separated", "true"] * 2]
    draw_grid(out / "separation.png", titles, columns)
    new1 = model.decoder1(torch.randn(8, LATENT, device=mixed.device))
    new2 = model.decoder2(torch.randn(8, LATENT, device=mixed.device))
    titles = ["Digit", "Garment", "Mixture"]  # of both generated.png and samples.png
    draw_grid(out / "generated.png", titles, [new1, new2, mix(new1, new2)])
    mixed, digit, garment = train_set[:8]
    captions = [f"{n}, {FashionMNIST.classes[k]}" for n, k in train_set.labels[:8]]
    draw_grid(out / "samples.png", titles, [digit, garment, mixed], captions)


def draw_losses(path, train_losses, val_losses):
    """Draw both losses by epoch."""
    ax = figure.Figure(figsize=(7, 4.5)).subplots()
    epochs = range(1, len(val_losses) + 1)
    ax.plot(epochs, train_losses, ".-", label="training (latents sampled)")
    ax.plot(epochs, val_losses, ".-", label="validation (latent means)")
    ticks = epochs[:: 1 + len(epochs) // 25]
    ax.set(xlabel="epoch", ylabel="loss (nats per image)", xticks=ticks)
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
    if args.epochs < 1 or args.batch_size < 2:
        parser.error("--epochs must be 1 or more, --batch-size 2 or more")
    if not (0 <= args.noise <= 1 and 0 < args.lr <= 1):
        parser.error("--noise must be from 0 to 1, --lr above 0 and at most 1")
    return args


def main(argv=None):
    """Train, save, measure, draw. Returns the exit status: 0, or 130 after Ctrl-C."""
    args = parse_arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    new_file = args.out / "mixvae.pt.new"
    new_file.touch()  # a folder that cannot be written is found out before training
    new_file.unlink()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("medium")  # faster, where there is bf16 or TF32
    train_set = MixMNIST(args.data, "train", args.noise, args.device)
    val_set = MixMNIST(args.data, "val", args.noise, args.device)
    test_set = MixMNIST(args.data, "test", args.noise, args.device)
    # collate_fn: it is a batch already. drop_last: batch norm cannot train on 1 image.
    batch_size = min(args.batch_size, len(train_set))
    train_data = DataLoader(
        train_set, batch_size, shuffle=True, drop_last=True, collate_fn=tuple
    )
    val_data = DataLoader(val_set, 500, collate_fn=tuple)
    model = VAE().to(args.device)
    # At equal rates, after one epoch, both decoders drew parts of both sources on 11 of
    # 30 seeds; with decoder 2 at half the rate, on none: decoder 1 took the digits.
    fast = [*model.encoder.parameters(), *model.decoder1.parameters()]
    adam = torch.optim.Adam(fast, args.lr, betas=(0.9, 0.95), fused=True)
    adam.add_param_group({"params": model.decoder2.parameters(), "lr": args.lr / 2})
    criterion = VAELoss(args.supervised)
    train_losses, val_losses = train_model(
        model, train_data, criterion, adam, args.epochs, val_data, args.device
    )
    put_digit_first(model, val_set)
    buffer = io.BytesIO()  # on a full disk, torch.save to a file raises no OSError
    torch.save(model.state_dict(), buffer)
    new_file.write_bytes(buffer.getvalue())
    new_file.replace(args.out / "mixvae.pt")
    print_psnr(model, test_set)
    draw_losses(args.out / "loss.png", train_losses, val_losses)
    draw_figures(args.out, model, train_set, test_set)
    print("\nwritten to", ascii(args.out.as_posix()))  # ascii: any console prints it
    return 0 if len(val_losses) == args.epochs else 130


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (OSError, FloatingPointError) as error:
        raise SystemExit(f"mixvae: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
