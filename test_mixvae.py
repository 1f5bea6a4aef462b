"""Tests of mixvae.py on drawn data; `python test_mixvae.py DIR` leaves a full-sized stand-in."""
import math, os, pathlib, re, resource, runpy, signal, subprocess, sys
from struct import pack
from unittest.mock import Mock

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST, FashionMNIST

import mixvae
from mixvae import VAE, MixMNIST, VAELoss, main, put_digit_first, separate, train_model

SCRIPT = pathlib.Path(__file__).resolve().with_name("mixvae.py")
FILES = ["generated.png", "loss.png", "mixvae.pt", "results.png", "samples.png", "separation.png"]
# Glyphs from top to bottom, a hexadecimal digit for the four cells of a row, mirrored for garments.
DIGITS = "75557 26227 71747 71717 55711 74717 74757 71111 75757 75717".split()
GARMENTS = "7FF3333 3333222 FFBB333 0133377 7FFBBBB 0001FF0 FFF7777 00037FF 12FFFFF 6666777".split()


def drawn(glyphs, labels, generator):
    """Images (N, 28, 28), uint8, of the glyphs that `labels` name, moved at random."""
    cells = torch.tensor([[list(map(int, f"{int(r, 16):04b}")) for r in glyph] for glyph in glyphs])
    if glyphs is GARMENTS:
        cells = torch.cat([cells, cells.flip(2)], dim=2)
    shapes = torch.kron(cells, torch.full((1, 3, 3), 250 if glyphs is DIGITS else 170)).byte()
    shapes = torch.nn.functional.pad(shapes, (1, 27 - shapes.shape[2], 2, 26 - shapes.shape[1]))
    moves = torch.randint(9 if glyphs is DIGITS else 4, (len(labels), 2), generator=generator)
    return torch.stack([shapes[k].roll(m, (0, 1)) for k, m in zip(labels, moves.tolist())])


def write_stand_in(root, n_train=60_000, n_test=10_000):
    """Write drawn MNIST and Fashion-MNIST files into `root`, in torchvision's layout."""
    generator = torch.Generator().manual_seed(0)
    for dataset, glyphs in (("MNIST", DIGITS), ("FashionMNIST", GARMENTS)):
        (raw := pathlib.Path(root, dataset, "raw")).mkdir(parents=True, exist_ok=True)
        for name, n in (("train", n_train), ("t10k", n_test)):
            labels = torch.randint(10, (n,), generator=generator)
            pixels = drawn(glyphs, labels, generator).numpy().tobytes()
            (raw / f"{name}-images-idx3-ubyte").write_bytes(pack(">4I", 2051, n, 28, 28) + pixels)
            (raw / f"{name}-labels-idx1-ubyte").write_bytes(pack(">2I", 2049, n) + bytes(labels))


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    write_stand_in(folder := tmp_path_factory.mktemp("data"), 1800, 300)
    return folder


@pytest.fixture(scope="session")
def model(root):
    trained, _ = train(root, 5)  # blind
    put_digit_first(trained, MixMNIST(root, "val"))
    return trained


def train(root, epochs, criterion=VAELoss(), model=None, train_set=None, hook=lambda *_: None):
    torch.manual_seed(0)
    model = model or VAE()
    parts = zip(model.children(), (0.008, 0.008, 0.004))
    adam = torch.optim.Adam([{"params": part.parameters(), "lr": lr} for part, lr in parts])
    adam.register_step_pre_hook(hook)
    train_data = DataLoader(train_set or MixMNIST(root), 55, shuffle=True, collate_fn=tuple)
    val_data = DataLoader(MixMNIST(root, "val"), 75, collate_fn=tuple)
    return model, train_model(model, train_data, criterion, adam, epochs, val_data, "cpu")


def weights(model):  # a copy, with the batch-norm statistics
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def psnr(estimate, truth):
    return -10 * math.log10((estimate - truth).square().mean().item())


def test_smoke_and_readme_lines(root, tmp_path, monkeypatch):
    out = tmp_path / "r\u00e9sultats"
    command = [sys.executable, SCRIPT, "--epochs", "2", "--data", root, "--out", out]
    env, pipe = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}, subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env) as run:
        first = run.stdout.readline()
        assert not (out / "mixvae.pt").exists()  # a live log
        text, errors = run.stdout.read(), run.stderr.read()
    assert run.returncode == 0 and errors == "" and sorted(os.listdir(out)) == FILES
    assert re.match("mixvae: .* 1,650 training, 150 .* 300 test pairs, blind, noise 0", first)
    assert re.search(r"\n +1 .*  best\n +2 .*\nwritten: .*/mixvae.pt\n", text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(root)
    (tmp_path / "results").symlink_to(out)
    names, readme = {}, SCRIPT.with_name("README.md").read_text()
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], names)
    assert names["digit"].shape == names["garment"].shape == (784,)


# ---- data ----------------------------------------------------------------------------------------
def test_mixture_is_the_average_of_corresponding_images(root):
    data, digits, garments = MixMNIST(root), MNIST(root).data / 255, FashionMNIST(root).data / 255
    mixed, sources = data[[5, 0, 7]]
    assert torch.equal(mixed[2], data[7][0]) and torch.equal(sources[2], data[7][1])
    assert torch.allclose(sources[2], torch.stack([digits[7], garments[7]]).flatten(1))
    assert torch.allclose(mixed[2], digits[7].flatten() / 2 + garments[7].flatten() / 2)
    assert torch.allclose(MixMNIST(root, "val")[0][1][1], garments[1650].flatten())
    digits = MNIST(root, train=False).data.flatten(1) / 255
    assert torch.allclose(MixMNIST(root, "test")[:][1][:, 0], digits)
    assert [len(MixMNIST(root, split)) for split in ("train", "val", "test")] == [1650, 150, 300]


def test_noise_is_on_the_mixture_alone(root):
    (clean, truth), (noisy, sources) = MixMNIST(root)[:], MixMNIST(root, noise=0.2)[:]
    assert torch.equal(sources, truth) and 0 <= noisy.min() <= noisy.max() <= 1
    middle = (clean > 0.3) & (clean < 0.5)  # where next to nothing is clamped
    assert (noisy - clean)[middle].std().item() == pytest.approx(0.2, rel=0.1)
    for split, fixed in (("train", False), ("val", True), ("test", True)):
        data = MixMNIST(root, split, noise=0.2)
        assert torch.equal(data[3][0], MixMNIST(root, split, noise=0.2)[[1, 3]][0][1]) == fixed
        assert not torch.allclose(data[3][0], MixMNIST(root, split)[3][0], atol=0.2)


@pytest.mark.parametrize("damage", [None, b"", b"too short"])
def test_no_data(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there
    if damage is not None:
        write_stand_in(tmp_path, 12, 12)
        (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(damage)
    with pytest.raises(OSError) as error:
        MixMNIST(tmp_path)
    for part in [f"{tmp_path}/MNIST/raw", "python test_mixvae.py DIR", *dict(MNIST.resources)]:
        assert part in str(error.value)


# ---- model and loss ------------------------------------------------------------------------------
def test_model():
    model, mixed = VAE(), torch.rand(5, 784)
    reconstruction, *images, mean1, logvar1, mean2, logvar2 = model(mixed)
    assert {latent.shape for latent in (mean1, logvar1, mean2, logvar2)} == {(5, 32)}
    assert all(image.shape == (5, 784) and 0 <= image.min() <= image.max() <= 1 for image in images)
    assert torch.allclose(reconstruction, images[0] / 2 + images[1] / 2)
    assert not any(map(torch.equal, model(mixed)[1:3], model(mixed)[1:3]))  # training samples
    _, source1, source2, mean1, _, mean2, _ = model.eval()(mixed)  # evaluation takes the means
    assert torch.equal(torch.cat([source1, source2]),
                       torch.cat([model.decoder1(mean1), model.decoder2(mean2)]))
    z = mixvae.reparameterise(torch.full((99999,), 3.0), torch.full((99999,), 2 * math.log(0.5)))
    assert (z.mean().item(), z.std().item()) == pytest.approx((3, 0.5), rel=0.02)


@pytest.mark.parametrize("supervised", [False, True])
def test_loss_is_the_formula_written_out(supervised):
    images, latents, sources = torch.rand(3, 6, 784), torch.randn(4, 6, 32), torch.rand(6, 2, 784)
    total, reconstruction, kl = VAELoss(supervised)((*images, *latents), sources)
    expected = sum(kl_divergence(Normal(mean, logvar.exp().sqrt()), Normal(0, 1)).sum().item() / 6
                   for mean, logvar in (latents[:2], latents[2:]))
    assert kl.item() == pytest.approx(expected, rel=1e-5)
    errors = [images[0] - (sources[:, 0] / 2 + sources[:, 1] / 2), images[1] - sources[:, 0],
              images[2] - sources[:, 1]]  # the last two where supervised
    expected = [784 / 2 * math.log((error**2).mean().item()) for error in errors]
    assert reconstruction.item() == pytest.approx(sum(expected[:3 if supervised else 1]), rel=1e-4)
    assert total.item() == pytest.approx((reconstruction + kl).item(), rel=1e-5)


# ---- training ------------------------------------------------------------------------------------
def test_training_is_blind(root):
    other = MixMNIST(root)
    swap = torch.rand(len(other), 1, 784) < 0.5  # other sources, pixel by pixel, same mixtures
    other.images = torch.where(swap, other.images.flip(1), other.images)
    assert torch.equal(weights(train(root, 1)[0]), weights(train(root, 1, train_set=other)[0]))


def test_schedule_and_best_epoch(root):
    model, rates, totals, states = VAE(), [], [], []
    script = iter([-4, -6, -9, -5, -8, -4, 1, 5])  # -5, -7, -6, 3 in epochs of two batches

    def criterion(outputs, sources):
        total, reconstruction, kl = VAELoss()(outputs, sources)
        if model.training:
            totals.append(total.item())
            return total, reconstruction, kl
        states.append(weights(model))
        return torch.tensor(float(next(script))), reconstruction, kl
    _, losses = train(root, 4, criterion, model, hook=lambda adam, *_: rates.append(
        [group["lr"] for group in adam.param_groups]))
    assert [validation for _, validation in losses] == [-5, -7, -6, 3]
    assert losses[0][0] == pytest.approx(sum(totals[:30]) / 30) and losses[3][0] < losses[0][0]
    assert torch.equal(weights(model), states[2]) and torch.equal(states[2], states[3])
    fast, _, slow = zip(*rates)
    assert len(fast) == 120 and fast[0] < 1e-3 > fast[-1] and 0.0072 <= max(fast) <= 0.0088
    assert 30 < fast.index(max(fast)) < 90 and slow == pytest.approx([rate / 2 for rate in fast])


# ---- separation and figures ----------------------------------------------------------------------
def test_digit_first(root, model):
    val_set, other = MixMNIST(root, "val"), MixMNIST(root, "val")
    other.images = other.images.flip(1)  # as if the garments were the digits
    before = model.eval()(val_set[:][0])
    for data, order in ((val_set, range(7)), (other, (0, 2, 1, 5, 6, 3, 4)), (val_set, range(7))):
        put_digit_first(model, data)
        for i, new in zip(order, model(val_set[:][0])):
            assert torch.allclose(before[i], new, atol=1e-5)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_blind_training_separates(noise, root, model):
    mixed, sources = MixMNIST(root, "test", noise)[:]
    decoded = torch.stack(model.eval()(mixed)[1:3], dim=1)
    stream, before = torch.get_rng_state(), weights(model.train())
    separated = separate(model, mixed, noise)
    assert model.training and torch.equal(before, weights(model))
    assert torch.equal(stream, torch.get_rng_state()) and separated.equal(separated.clamp(0, 1))
    assert torch.allclose(separated[5:6], separate(model, mixed[5:6], noise), atol=1e-3)
    assert torch.allclose(separated.sum(dim=1), 2 * mixed, atol=1e-6) == (noise == 0)
    plain = [psnr(decoded[:, k], sources[:, k]) for k in (0, 1)]
    assert noise or min(plain) > max(psnr(mixed, sources[:, k]) for k in (0, 1)) + 3
    assert psnr(separated, sources) > (psnr(decoded, sources) if noise else max(plain) + 1)
    assert not noise or psnr(separated, sources) > psnr(separate(model, mixed), sources)
    refined, kept = (psnr(separate(model, mixed, near), sources) for near in (0.199, 0.2))
    assert noise > 0.2 or refined > kept + 0.05
    assert torch.allclose(separate(model, mixed, 1e4), decoded, atol=1e-5)  # nothing moved


def test_table_and_pictures(root, model, capsys):
    mixed, sources = (test_set := MixMNIST(root, "test"))[:]
    separated, outputs = separate(model, mixed).unbind(dim=1), model.eval()(mixed)
    mixvae.print_psnr(model.train(), test_set)
    printed = [float(value) for value in re.findall(r"\d+\.\d+", capsys.readouterr().out)]
    assert printed == pytest.approx([psnr(images[k], sources[:, k]) for images in (
        [mixed, mixed], outputs[1:3], separated) for k in (0, 1)], abs=0.006)
    pictures = mixvae.prepare_images(model.train(), MixMNIST(root), test_set)
    assert ", ".join(pictures["results.png"]) == (
        "Reconstructed image, Fashion image, Number image, Main image")
    shown = [*pictures["results.png"].values(), *pictures["separation.png"].values()]
    expected = [outputs[0], outputs[2], outputs[1], mixed, mixed, outputs[1], separated[0],
                sources[:, 0], outputs[2], separated[1], sources[:, 1]]
    assert all(torch.allclose(image, whole[:8], atol=1e-3) for image, whole in zip(shown, expected))
    digit, garment, mixture = map(pictures["generated.png"].get, ("Digit", "Garment", "Mixture"))
    assert digit.std(dim=0).max() > 0.1 and torch.allclose(mixture, digit / 2 + garment / 2)


# ---- command line --------------------------------------------------------------------------------
def test_flags_reach_the_training(root, tmp_path, monkeypatch):
    calls, flags = [], ["--data", str(root), "--out", str(tmp_path)]
    monkeypatch.setattr(mixvae, "train_model", lambda *args: calls.append(args) or 1 / 0)
    for more in ["", "--epochs 3 --supervised --noise .1 --batch-size 1649 --lr .001", "--seed 1"]:
        pytest.raises(ZeroDivisionError, main, flags + more.split())  # enough seen
    first, second, third = [weights(args[0]) for args in calls]
    assert torch.equal(first, second) and not torch.equal(first, third)
    _, train_data, criterion, _, epochs, val_data, *_ = calls[0]
    assert epochs == 20 and not criterion.supervised and train_data.dataset.noise == 0
    stream = torch.get_rng_state()
    assert torch.equal(torch.cat([sources for _, sources in val_data]), MixMNIST(root, "val")[:][1])
    assert torch.equal(stream, torch.get_rng_state())  # validation leaves it alone
    _, train_data, criterion, adam, epochs, val_data, *_ = calls[1]
    assert (epochs, criterion.supervised) == (3, True)
    assert train_data.dataset.noise == val_data.dataset.noise == 0.1
    assert [(g["lr"], len(g["params"])) for g in adam.param_groups] == [(0.001, 16), (0.0005, 8)]
    (_, batch), = train_data  # shuffled; a last batch of one image is dropped
    assert len(batch) == 1649 and not torch.equal(batch, MixMNIST(root)[:1649][1])


@pytest.mark.parametrize("name, fault, outcome, new, epochs", [
    ("kl_divergence", "Ctrl-C", 130, True, 1), ("put_digit_first", "Ctrl-C", 130, True, 2),
    ("print_psnr", "Ctrl-C", KeyboardInterrupt, None, 2),  # a new model, and no figures
    ("put_digit_first", "full disk", OSError, False, 2),
    ("gaussian_nll", "divergence", FloatingPointError, False, 0)])
def test_faults(name, fault, outcome, new, epochs, root, tmp_path, monkeypatch, capsys):
    function, limit = getattr(mixvae, name), resource.getrlimit(resource.RLIMIT_FSIZE)

    def faulty(*args, **kwargs):
        if fault == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)
        if fault == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        return math.nan * function(*args, **kwargs) if fault == "divergence" else function(*args)
    monkeypatch.setattr(mixvae, name, faulty)
    for file in FILES:
        (tmp_path / file).write_text("old")
    try:
        status = main(["--epochs", "2", "--data", str(root), "--out", str(tmp_path)])
    except (KeyboardInterrupt, OSError, FloatingPointError) as error:
        status = type(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert status == outcome and len(re.findall(r"\n {4}\d ", capsys.readouterr().out)) == epochs
    files = {path.name: path.read_bytes() != b"old" for path in tmp_path.iterdir()}
    assert files == ({"mixvae.pt": True} if new is None else dict.fromkeys(FILES, new))


@pytest.mark.parametrize("flag, error, status", [(flag, None, 2) for flag in (
    "--epochs=0 --epochs=1e2 --noise=nan --noise=-1 --batch-size=1 --lr=0 --lr=inf --device=tpu"
    ).split()] + [("--lr=1", OSError("full"), "mixvae: full"), ("--lr=1", KeyboardInterrupt(), 130),
                  ("--lr=1", FloatingPointError("nan"), "mixvae: nan")])
def test_exit_status(flag, error, status, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch, "manual_seed", Mock(side_effect=error))
    monkeypatch.setattr(sys, "argv", ["mixvae.py", "--out", str(tmp_path), flag])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == status
    assert status != 2 or flag.split("=")[0] in capsys.readouterr().err.splitlines()[-1]


if __name__ == "__main__":
    write_stand_in(*sys.argv[1:2] or sys.exit("usage: python test_mixvae.py DIR"))
