"""Tests of mixvae.py on the CPU, on drawn data; `python test_mixvae.py DIR` draws it"""

import os
import runpy
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torchvision.datasets import MNIST, FashionMNIST

import mixvae
from mixvae import VAE, MixMNIST, VAELoss, main, separate, train_model

FLAGS = ["--data=drawn", "--device=cpu", "--noise=.03", "--epochs=3", "--batch-size=55"]
FIGURES = {"generated.png", "loss.png", "results.png", "samples.png", "separation.png"}
FILES = FIGURES | {"mixvae.pt"}
CTRL_C, FULL = Mock(side_effect=KeyboardInterrupt), Mock(side_effect=OSError("full"))
torch.set_num_threads(1)  # so that the thread below brings no second pool of threads


def write_stand_in(root, n_train=60_000, n_test=10_000):
    """Write MNIST and FashionMNIST files of grey boxes and white frames into `root`."""
    torch.manual_seed(0)
    for dataset in ("MNIST", "FashionMNIST"):
        folder = Path(root, dataset, "raw")
        folder.mkdir(parents=True, exist_ok=True)
        for name, n in (("train", n_train), ("t10k", n_test)):
            labels = torch.randint(10, (n, 1, 1), dtype=torch.int8)
            left, top = torch.randint(-17, -10, (2, n, 1, 1), dtype=torch.int8)
            x = (torch.arange(28, dtype=torch.int8) + left).abs() - labels % 5
            y = (torch.arange(28, dtype=torch.int8)[:, None] + top).abs() - labels // 5
            images = 170 * (torch.maximum(x - 6, y - 9) <= 0).byte()
            if dataset == "FashionMNIST":  # whose frames decoder 1 learns first
                images = 250 * (torch.maximum(x - 2, y - 5).abs() <= 1).byte()
            data = struct.pack(">2I", 2049, n) + bytes(labels.numpy())
            (folder / f"{name}-labels-idx1-ubyte").write_bytes(data)
            data = struct.pack(">4I", 2051, n, 28, 28) + bytes(images.numpy())
            (folder / f"{name}-images-idx3-ubyte").write_bytes(data)


@pytest.fixture(scope="session", autouse=True)
def child(tmp_path_factory):
    """A finished run of the script, in a folder where all tests then find its files."""
    os.chdir(tmp_path_factory.mktemp("r\u00e9sum\u00e9"))
    write_stand_in("drawn", 1800, 300)
    env = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "missing", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, mixvae.__file__, *FLAGS]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True)


@pytest.fixture
def model():
    model = VAE().eval()
    model.load_state_dict(torch.load("results/mixvae.pt"))
    return model


def weights(model):
    return torch.cat([values.flatten() for values in model.state_dict().values()])


def psnr(estimate, truth):
    return -10 * (estimate - truth).square().mean().log10().item()


def test_smoke(child):
    assert child.returncode == 0, child.stdout + child.stderr
    assert "Traceback" not in child.stderr
    assert set(os.listdir("results")) == FILES


# ---- data ----------------------------------------------------------------------------
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_pairs(split):
    start, end = {"train": (0, 1650), "val": (1650, 1800), "test": (0, 300)}[split]
    mnist = MNIST("drawn", train=split != "test")
    fashion = FashionMNIST("drawn", train=split != "test")
    pairs = MixMNIST("drawn", split)
    mixed, digit, garment = pairs[:]
    assert torch.equal(digit, mnist.data[start:end].flatten(1) / 255)
    assert torch.equal(garment, fashion.data[start:end].flatten(1) / 255)
    assert torch.allclose(mixed, digit / 2 + garment / 2)
    assert torch.equal(pairs.labels[:, 0], mnist.targets[start:end])
    assert torch.equal(pairs.labels[:, 1], fashion.targets[start:end])
    noisy_pairs = MixMNIST("drawn", split, noise=0.2)
    noisy, *sources = noisy_pairs[:]
    assert all(map(torch.equal, sources, (digit, garment)))
    assert (noisy - mixed).std().item() == pytest.approx(0.2, rel=0.02)
    assert noisy[mixed == 0].mean().item() == pytest.approx(0, abs=0.01)  # not clamped
    assert not torch.equal(noisy_pairs[:][0], noisy)


@pytest.mark.parametrize("damage", [None, b"", b"too short"])
def test_no_data(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens
    if damage is not None:
        write_stand_in(tmp_path, 12, 12)
        Path(tmp_path, "MNIST/raw/train-images-idx3-ubyte").write_bytes(damage)
    with pytest.raises(OSError, match=r"^no data in .* \(see README.md\).*$"):
        MixMNIST(tmp_path)


# ---- model and loss ------------------------------------------------------------------
@pytest.mark.parametrize("supervised", [False, True])
def test_model_and_loss(supervised, model):
    mixed, digit, garment = torch.rand(3, 6, 784)
    outputs = model(mixed)
    reconstruction, source1, source2, mean1, logvar1, mean2, logvar2 = outputs
    assert {x.shape for x in (mean1, logvar1, mean2, logvar2)} == {(6, 32)}
    assert torch.equal(source1, model.decoder1(mean1))
    assert torch.equal(source2, model.decoder2(mean2))
    assert torch.allclose(reconstruction, source1 / 2 + source2 / 2)
    total, nll, kl = VAELoss(supervised)(outputs, digit, garment)
    mean, logvar = torch.cat([mean1, mean2]), torch.cat([logvar1, logvar2])
    expected = kl_divergence(Normal(mean, logvar.exp().sqrt()), Normal(0, 1))
    assert kl.item() == pytest.approx(expected.sum().item() / 6, rel=1e-5)
    errors = [reconstruction - (digit + garment) / 2]
    if supervised:
        errors += [source1 - digit, source2 - garment]
    expected = sum(784 / 2 * error.square().mean().log().item() for error in errors)
    assert nll.item() == pytest.approx(expected, rel=1e-5)
    assert total.item() == pytest.approx(nll.item() + kl.item(), rel=1e-5)
    _, source1, source2, *_ = model.train()(mixed)
    _, again1, again2, *_ = model(mixed)
    assert not torch.allclose(source1, again1)
    assert not torch.allclose(source2, again2)
    z = mixvae.reparameterise(torch.zeros(99_999), torch.tensor(0.5**2).log())
    assert z.std().item() == pytest.approx(0.5, rel=0.02)


# ---- training ------------------------------------------------------------------------
@pytest.mark.parametrize("statement", [*range(30), 999])
@torch.enable_grad()  # the interrupt may skip the end of no_grad
def test_training(statement, monkeypatch):
    """With Ctrl-C at a statement between epoch 2's last step and epoch 3's first."""
    net = torch.nn.Linear(784, 1)
    adam = torch.optim.Adam(net.parameters(), 0.1)
    rates, states, statements = [], [], iter(range(statement))

    def criterion(outputs, digit, garment):
        if net.training:
            rates.append(adam.param_groups[0]["lr"])
            return outputs.mean(), 0, 0
        states.append(weights(net))
        return [-5.0, -7.0, -7.0, 3.0][len(states) - 1], 0, 0

    def tracer(frame, event, _):
        if frame.f_code is not train_model.__code__:
            return None
        if len(rates) == 20 and next(statements, None) is None:
            raise KeyboardInterrupt
        return tracer

    data = [torch.rand(3, 4, 784).unbind()]
    monkeypatch.setattr(sys, "stdout", Mock())
    sys.settrace(tracer)
    losses, val_losses = train_model(net, 10 * data, criterion, adam, 4, data, "cpu")
    sys.settrace(None)
    finished = len(val_losses)
    assert val_losses == [-5, -7, -7, 3][:finished]
    assert len(losses) == finished
    assert torch.equal(weights(net), states[min(finished, 2) - 1])
    assert sys.stdout.flush.call_count > finished  # a live log
    assert rates == sorted(rates[:24]) + sorted(rates[24:], reverse=True)
    assert rates[19] == pytest.approx(0.1, rel=0.1)


# ---- separation ----------------------------------------------------------------------
def test_digit_first(model):
    pairs = MixMNIST("drawn", "val")
    mixed, _, _ = pairs[:]
    reconstruction, source1, source2, mean1, logvar1, mean2, logvar2 = model(mixed)
    swapped = reconstruction, source2, source1, mean2, logvar2, mean1, logvar1
    mixvae.put_digit_first(model, pairs)  # leaves them as they are
    pairs.digits, pairs.garments = pairs.garments, pairs.digits
    mixvae.put_digit_first(model, pairs)
    assert all(map(torch.equal, model(mixed), swapped))


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_separate(noise, model):
    mixed, *truth = MixMNIST("drawn", "test", noise)[:100]
    _, *decoded = model(mixed)[:3]
    separated = torch.stack(separate(model, mixed, noise))
    for k in (0, 1):
        assert psnr(decoded[k], truth[k]) > psnr(mixed, truth[k]) + 1
        assert psnr(separated[k], truth[k]) > psnr(decoded[k], truth[k]) + 0.5
    refined = torch.stack(separate(model, mixed, noise=1e4))  # nothing is shared out
    assert psnr(refined.mean(dim=0), mixed) > psnr(sum(decoded) / 2, mixed)
    # The conditional mean of two Gaussian variables, given their average and its noise.
    prior = torch.tensor([0.2, 0.1]).view(2, 1, 1) * refined * (1 - refined)
    gain = (mixed - refined.mean(dim=0)) / (prior.sum(dim=0) / 4 + noise**2 + 1e-9)
    inside = ((separated > 0) & (separated < 1)).all(dim=0)  # not clamped
    assert (separated - refined - prior / 2 * gain)[:, inside].abs().max() < 0.01
    assert torch.equal(separated, separated.clamp(0, 1))


def test_separate_without_noise(model):
    mixed, _, _ = MixMNIST("drawn", "test")[:50]
    mixed[0] = 0  # all black
    before = weights(model)
    digit, garment = separate(model.train(), mixed)
    assert torch.allclose(digit + garment, 2 * mixed, atol=1e-6)
    assert torch.allclose(digit[5:6], separate(model, mixed[5:6])[0], atol=1e-3)
    assert model.training
    assert {parameter.grad for parameter in model.parameters()} == {None}
    assert torch.equal(weights(model), before)
    for parameter in model.parameters():
        parameter.data *= 99  # decoders without a doubt must not divide 0 by 0
    assert torch.isfinite(torch.cat(separate(model, mixed))).all()


def test_table(child, model):
    mixed, *truth = MixMNIST("drawn", "test", 0.03)[:]  # with other draws of the noise
    estimates = [mixed, mixed, *model(mixed)[1:3], *separate(model, mixed, 0.03)]
    expected = [psnr(*pair) for pair in zip(estimates, 3 * truth)]
    values = [float(x) for x in child.stdout.split("PSNR")[1].split() if "." in x]
    assert values == pytest.approx(expected, abs=0.1)  # draws deviate by 0.01 dB


# ---- figures -------------------------------------------------------------------------
def test_figures_and_same_run_in_thread(model, tmp_path):
    with patch("matplotlib.figure.Figure.savefig", autospec=True) as savefig:
        ThreadPoolExecutor().submit(main, [*FLAGS, f"--out={tmp_path}"]).result()
    figures = {Path(call.args[1]).name: call.args[0] for call in savefig.mock_calls}
    again = torch.load(tmp_path / "mixvae.pt")
    assert all(torch.equal(x, again[name]) for name, x in model.state_dict().items())
    mixed, _, _ = MixMNIST("drawn", "test")[:8]
    reconstruction, source1, source2, *_ = model(mixed)
    axes = figures["results.png"].axes[0]
    windows = torch.tensor(axes.images[0].get_array()).unfold(1, 28, 1)
    places = []
    for image in (reconstruction, source2, source1, mixed):
        errors = (windows - image[3].view(28, 28)[14]).abs().sum(dim=2)
        places.append(errors.amin(dim=0).argmin().item())
    assert places == sorted(set(places))
    titles = [label.get_text().split()[0] for label in axes.get_xticklabels()]
    assert titles == ["Reconstructed", "Fashion", "Number", "Main"]
    pixels = torch.tensor(figures["generated.png"].axes[0].images[0].get_array())
    assert min(len(x.unique(dim=0)) for x in pixels.chunk(3, dim=1)) > 60  # 8 x 28 rows
    number, kind = MixMNIST("drawn").labels[3].tolist()
    captions = figures["samples.png"].axes[0].get_yticklabels()
    assert captions[3].get_text() == f"{number}, {FashionMNIST.classes[kind]}"


# ---- command line --------------------------------------------------------------------
def test_flags(monkeypatch):
    starts = []

    def spy(model, train_data, criterion, optimizer, epochs, val_data, device):
        starts.append(weights(model))
        assert (epochs, device) == (3, "cpu")
        assert criterion.supervised
        (batch,) = train_data
        assert len(batch[1]) == 1649  # of 1650, as a batch of one cannot train
        assert not torch.equal(batch[1], train_data.dataset[:1649][1])  # shuffled
        assert [train_data.dataset.noise, val_data.dataset.noise] == [0.1, 0.1]
        assert len(val_data.dataset) == 150
        assert [group["lr"] for group in optimizer.param_groups] == [0.001, 0.0005]
        assert {*optimizer.param_groups[1]["params"]} == {*model.decoder2.parameters()}
        raise KeyboardInterrupt

    monkeypatch.setattr(mixvae, "train_model", spy)
    flags = "--supervised --noise=.1 --batch-size=1649 --lr=.001 --epochs=3"
    for seed in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            main([*FLAGS, *flags.split(), f"--seed={seed}"])
    assert not torch.equal(*starts)


@pytest.mark.parametrize(
    ("place", "name", "call", "fault", "code", "new"),
    [
        (torch.optim.Adam, "step", 2, CTRL_C, "130", set()),
        (torch.optim.Adam, "step", 4, CTRL_C, "130", FILES),
        (torch.optim.Adam, "step", 5, CTRL_C, "130", {"mixvae.pt"}),  # the table's
        (Path, "write_bytes", 1, FULL, "mixvae: full", {"mixvae.pt.new"}),
        (torch.nn.Linear, "forward", 1, lambda y: y * torch.nan, "mixvae: the", set()),
    ],
)
def test_faults(place, name, call, fault, code, new, tmp_path, monkeypatch):
    original, calls = getattr(place, name), []

    def faulty(*args, **kwargs):
        calls.append(original(*args, **kwargs))
        return fault(calls[-1]) if len(calls) == call else calls[-1]

    for file in FILES:
        (tmp_path / file).write_bytes(b"old")
    monkeypatch.setattr(place, name, faulty)
    argv = ["mixvae.py", *FLAGS, "--epochs=2", "--batch-size=800", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "stdout", Mock(spec=["write", "flush"]))  # as an IDE's
    with pytest.raises(SystemExit) as end:
        runpy.run_path(mixvae.__file__, run_name="__main__")
    assert str(end.value.code).startswith(code)
    assert {x.name for x in tmp_path.iterdir() if x.read_bytes() != b"old"} == new


@pytest.mark.parametrize("flag", ["epochs=0", "noise=nan", "batch-size=1", "lr=0"])
def test_wrong_flag(flag, capsys):
    with pytest.raises(SystemExit) as end:
        main([*FLAGS, f"--{flag}"])
    assert end.value.code == 2
    assert flag.split("=")[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
def test_accelerator(tmp_path):
    assert main(["--data=drawn", "--epochs=1", f"--out={tmp_path}"]) == 0


if __name__ == "__main__":
    write_stand_in(sys.argv[1])
