"""Print the README's figures that a plain run does not print itself, on the real data in data/.

    python .github/measure.py seeds N [FLAGS]    the script with FLAGS and the seeds 0 to N - 1
    python .github/measure.py alike N [FLAGS]    the same, but decoder 2 learns as fast as decoder 1
    python .github/measure.py recipe             a plain recipe for the same task, 20 epochs
"""
import contextlib, io, re, statistics, sys, tempfile, time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mixvae
from mixvae import VAE, MixMNIST, VAELoss, layer


def seeds(n, *flags):
    """Each seed's PSNR, decoded (digit, garment) and separated (both have the same)."""
    columns = []
    for seed in range(n):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), tempfile.TemporaryDirectory() as out:
            mixvae.main([*flags, "--seed", str(seed), "--out", out])
        rows = dict(re.findall(r"^(decoded|separated) +(.*)$", output.getvalue(), re.MULTILINE))
        columns.append([*map(float, rows["decoded"].split()), float(rows["separated"].split()[0])])
        print(f"seed {seed:2}: decoded {columns[-1][0]:.2f} / {columns[-1][1]:.2f}, "
              f"separated {columns[-1][2]:.2f}", flush=True)
    for name, values in zip(["decoded digit", "decoded garment", "separated"], zip(*columns)):
        print(f"{name:15}: minimum {min(values):.2f}, median {statistics.median(values):.2f}, "
              f"maximum {max(values):.2f}")


def alike(n, *flags):
    """`seeds`, where a single rate, the first, is the peak of the schedule for the whole model."""
    cycle = torch.optim.lr_scheduler.OneCycleLR
    torch.optim.lr_scheduler.OneCycleLR = lambda optimizer, rates, **options: cycle(
        optimizer, rates[0], **options)
    seeds(n, *flags)


def recipe():
    """Binary cross-entropy of the mixture + KL divergence, Adam 1e-4, batches of 32 in order."""
    torch.manual_seed(0)
    model = VAE()
    model.encoder = nn.Sequential(layer(784, 512), layer(512, 256), layer(256, 128), layer(128, 64),
                                  nn.Linear(64, 128), nn.Unflatten(1, (2, 2, 32)))
    model.decoder1, model.decoder2 = (
        nn.Sequential(layer(32, 64), layer(64, 128), layer(128, 256), layer(256, 512),
                      nn.Linear(512, 784), nn.Sigmoid()) for _ in range(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    train_data = DataLoader(MixMNIST(), 32, collate_fn=tuple)
    start = time.perf_counter()
    for _ in range(20):
        for mixed, sources in train_data:
            outputs = model(mixed)
            bce = binary_cross_entropy(outputs[0], mixed, reduction="sum") / len(mixed)
            optimizer.zero_grad()
            (bce + VAELoss()(outputs, sources)[2]).backward()
            optimizer.step()
    print(f"{(time.perf_counter() - start) / 20:.2f} s an epoch")
    mixvae.put_digit_first(model, MixMNIST(split="val"))
    mixvae.print_psnr(model, MixMNIST(split="test"))


if __name__ == "__main__":
    if sys.argv[1] == "recipe":
        recipe()
    else:
        {"seeds": seeds, "alike": alike}[sys.argv[1]](int(sys.argv[2]), *sys.argv[3:])
