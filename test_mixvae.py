"""Tests of mixvae.py on drawn images; `python test_mixvae.py DIR` writes them to DIR"""

import runpy
import struct
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import mixvae
from mixvae import VAE, MixMNIST, VAELoss, main, psnr, separate, train_model

FLAGS = ["--device=cpu", "--epochs=3", "--batch-size=50", "--noise=.1", "--seed=7"]
BATCH = torch.rand(3, 4, 784)  # mixed, digit, garment


def write_stand_in(root, n_train=60_000, n_test=10_000):
    """Write white frames, grey boxes and, as labels, top rows; all in MNIST's format"""
    for dataset, size, grey, hole in ("MNIST", 12, 250, 6), ("FashionMNIST", 8, 170, 0):
        folder = Path(root, dataset, "raw")
        folder.mkdir(parents=True, exist_ok=True)
        for part, n in (("train", n_train), ("t10k", n_test)):
            images = torch.zeros(n, 28, 28, dtype=torch.uint8)
            corners = torch.randint(10, (n, 2)).tolist()
            for image, (top, left) in zip(images, corners):
                image[top : top + size, left : left + size] = grey
                image[top + 3 : top + 3 + hole, left + 3 : left + 3 + hole] = 0
            data = struct.pack(">4I", 2051, n, 28, 28) + bytes(images.numpy())
            (folder / f"{part}-images-idx3-ubyte").write_bytes(data)
            data = struct.pack(">2I", 2049, n) + bytes(top for top, _ in corners)
            (folder / f"{part}-labels-idx1-ubyte").write_bytes(data)


@pytest.fixture(scope="session", autouse=True)
def run(tmp_path_factory):  # of the command line; all tests work in its folder
    pytest.MonkeyPatch().chdir(tmp_path_factory.mktemp("run"))
    write_stand_in("data", 6500, 600)
    command = [sys.executable, mixvae.__file__, *FLAGS]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.fixture
def model():
    model = VAE().eval()
    model.load_state_dict(torch.load("results/mixvae.pt"))
    return model


def test_smoke(run):
    assert run.returncode == 0, run.stderr
    names = {"generated", "loss", "mixvae", "results", "samples", "separation"}
    assert {path.stem for path in Path("results").iterdir()} == names


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_pairs_and_labels(split):
    part = {"train": slice(1500), "val": slice(1500, 6500), "test": slice(600)}[split]
    pairs = MixMNIST(split=split)
    mixed, *sources = pairs[:]
    assert_close(mixed, (sources[0] + sources[1]) / 2)
    for k, dataset in enumerate((mixvae.MNIST, mixvae.FashionMNIST)):
        original = dataset("data", train=split != "test")
        assert_close(sources[k], original.data[part].flatten(1) / 255)
        assert_close(pairs.labels[:, k], original.targets[part])


def test_noise():
    mixed, *sources = MixMNIST()[:]
    noisy_pairs = MixMNIST(noise=0.2)
    noisy, *same_sources = noisy_pairs[:]
    assert_close(same_sources, sources)
    assert (noisy - mixed).std().item() == pytest.approx(0.2, rel=0.02)
    assert noisy[mixed == 0].mean().item() == pytest.approx(0, abs=0.01)  # not clamped
    assert not torch.equal(noisy_pairs[:][0], noisy)  # but drawn anew


def test_model(model):
    reconstruction, decoded1, decoded2, mean1, logvar1, mean2, logvar2 = model(BATCH[0])
    assert {x.shape for x in (mean1, logvar1, mean2, logvar2)} == {(4, 32)}
    assert_close((decoded1, decoded2), (model.decoder1(mean1), model.decoder2(mean2)))
    assert_close(reconstruction, (decoded1 + decoded2) / 2)
    _, decoded1, decoded2, mean1, _, mean2, _ = model.train()(BATCH[0])  # samples
    assert not torch.allclose(decoded1, model.decoder1(mean1))
    assert not torch.allclose(decoded2, model.decoder2(mean2))
    sample = mixvae.reparameterize(torch.full((99_999,), 3.0), torch.tensor(4.0).log())
    assert (sample.mean(), sample.std()) == pytest.approx((3, 2), rel=0.02)


@pytest.mark.parametrize("supervised", [False, True])
def test_loss(supervised, model):
    mixed, digit, garment = torch.rand(3, 6, 784)
    outputs = model(mixed)
    reconstruction, decoded1, decoded2, mean1, logvar1, mean2, logvar2 = outputs
    nll = 784 / 2 * (reconstruction - (digit + garment) / 2).square().mean().log()
    if supervised:  # else, blind, only the mixture counts
        nll += 784 / 2 * (decoded1 - digit).square().mean().log()
        nll += 784 / 2 * (decoded2 - garment).square().mean().log()
    mean, logvar = torch.cat([mean1, mean2]), torch.cat([logvar1, logvar2])
    kl = kl_divergence(Normal(mean, logvar.exp().sqrt()), Normal(0, 1)).sum() / 6
    assert_close(VAELoss(supervised)(outputs, digit, garment), (nll + kl, nll, kl))


@pytest.mark.parametrize("finished", [4, 2])
def test_best_epoch_even_after_ctrl_c(finished):
    def criterion(outputs, digit, garment):
        loss = outputs.mean() - outputs.mean().item() + 1  # 1, with gradient
        return 3 * [loss if net.training else torch.tensor(val_loss())]

    net = torch.nn.Linear(784, 1)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    weights, script = [], [-4.0, -6.0, -6.0, -8.0, -7.0, -7.0, 2.0, 4.0][: 2 * finished]
    sgd.register_step_post_hook(lambda *_: weights.append(net.weight.clone()))
    val_loss = Mock(side_effect=[*script, KeyboardInterrupt])  # in epoch 3 of 4
    losses = train_model(net, 2 * [BATCH], criterion, sgd, 4, 2 * [BATCH], "cpu")
    assert losses == (finished * [1], [-5, -7, -7, 3][:finished])  # means of batches
    assert_close(net.weight, weights[3])  # of the two best epochs, the first


def test_learning_rate():
    net = torch.nn.Linear(784, 1)
    sgd = torch.optim.SGD(net.parameters(), 1.0)
    rates = []
    sgd.register_step_pre_hook(lambda *_: rates.append(sgd.param_groups[0]["lr"]))
    train_model(net, 10 * [BATCH], lambda x, *_: 3 * [x.mean()], sgd, 4, [], "cpu")
    assert rates == sorted(rates[:24]) + sorted(rates[24:], reverse=True)  # 60 % rise
    assert (rates[23], rates[39]) == pytest.approx((1, 0), abs=0.01)


def test_device_and_early_ctrl_c():
    net = torch.nn.Linear(784, 1)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    ctrl_c = Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        train_model(net, [BATCH], ctrl_c, sgd, 1, [BATCH], "meta")
    assert {x.device.type for x in (net.weight, *ctrl_c.call_args.args)} == {"meta"}


def test_digit_first(model):
    pairs = MixMNIST(split="val")
    _, decoded1, decoded2, *_ = model(BATCH[0])
    mixvae.put_digit_first(model, pairs)
    assert_close(model(BATCH[0])[1:3], (decoded1, decoded2))  # left as they were
    pairs.digits, pairs.garments = pairs.garments, pairs.digits
    mixvae.put_digit_first(model, pairs)
    assert_close(model(BATCH[0])[1:3], (decoded2, decoded1))


@pytest.mark.parametrize(("noise", "gain"), [(0.0, 2.5), (0.3, 0.3)])
def test_separate_improves(noise, gain, model):
    mixed, *truth = MixMNIST(split="test", noise=noise)[:]
    for old, new, true in zip(model(mixed)[1:3], separate(model, mixed, noise), truth):
        assert psnr(mixed, true) + 1 < psnr(old, true) < psnr(new, true) - gain


def test_separate_shares_residual_by_variance(model):
    mixed, _, _ = MixMNIST(split="test", noise=0.3)[:99]
    decoded = torch.stack(separate(model, mixed, noise=1e9))  # so noisy: nothing shared
    variance = torch.tensor([0.2, 0.1]).view(2, 1, 1) * decoded * (1 - decoded)
    gain = (2 * mixed - decoded.sum(dim=0)) / (variance.sum(dim=0) + 4 * 0.3**2)
    separated = torch.stack(separate(model, mixed, noise=0.3))
    assert_close(separated, (decoded + variance * gain).clamp(0, 1), atol=1e-3, rtol=0)


def test_separate_without_noise(model):
    mixed, _, _ = MixMNIST(split="test")[:50]
    digit, garment = separate(model, mixed)
    assert_close(digit + garment, 2 * mixed)
    assert_close((digit.clamp(0, 1), garment.clamp(0, 1)), (digit, garment))
    assert_close(separate(model, mixed[5:6])[0], digit[5:6], atol=1e-3, rtol=0)


def test_separate_black_and_leave_weights(model):
    for parameter in model.parameters():
        parameter.data *= 99  # all decoded pixels are then 0 or 1, without variance
    before = [values.clone() for values in model.state_dict().values()]
    assert_close(sum(separate(model.train(), torch.zeros(4, 784))), torch.zeros(4, 784))
    assert_close([*model.state_dict().values()], before)
    assert {parameter.grad for parameter in model.parameters()} == {None}


def test_printed_psnr(run, model):
    mixed, digit, garment = MixMNIST(split="test", noise=0.1)[:]  # a new draw
    _, decoded1, decoded2, *_ = model(mixed)
    estimates = mixed, mixed, decoded1, decoded2, *separate(model, mixed, noise=0.1)
    pairs = zip(estimates, 3 * (digit, garment))
    expected = [-10 * (x - y).square().mean().log10().item() for x, y in pairs]
    table = run.stdout.split("garment")[1].split()
    assert [float(x) for x in table if "." in x] == pytest.approx(expected, abs=0.3)


def test_figures_of_results(model):
    pairs = MixMNIST(split="test")
    mixed, digit, garment = pairs[:8]
    reconstruction, decoded1, decoded2, *_ = model(mixed)
    separated1, separated2 = separate(model, mixed)
    with patch("mixvae.draw_grid") as draw_grid:
        mixvae.draw_results(Path(), model, pairs)
    results, separation, generated = [call.args for call in draw_grid.mock_calls]
    columns = [mixed, decoded1, separated1, digit, decoded2, separated2, garment]
    assert_close(results[2], [reconstruction, decoded2, decoded1, mixed])
    assert_close(separation[2], columns)
    assert [title[0] for title in results[1] + separation[1]] == [*"RFNMMDDDGGG"]
    assert [len(images.unique(dim=0)) for images in generated[2]] == [8, 8]


def test_figure_of_samples():
    with patch("mixvae.draw_grid") as draw_grid:
        mixvae.draw_samples("samples.png", MixMNIST())
    _, titles, (digit, garment, _), captions = draw_grid.call_args.args
    assert titles == ["Digit", "Garment", "Mixture"]
    assert not torch.equal(digit, MixMNIST()[:8][1])  # but random pairs
    n, k = (int(image[5].nonzero()[0]) // 28 for image in (digit, garment))  # labels
    assert captions[5] == f"{n}, {mixvae.FashionMNIST.classes[k]}"


def test_flags_reach_training():
    train = patch("mixvae.train_model", side_effect=KeyboardInterrupt)
    with train as spy, pytest.raises(KeyboardInterrupt):
        main([*FLAGS, "--supervised", "--batch-size=1499", "--lr=.001"])
    _, train_data, criterion, optimizer, epochs, val_data, device = spy.call_args.args
    assert (epochs, device, criterion.supervised) == (3, "cpu", True)
    assert [group["lr"] for group in optimizer.param_groups] == [0.001, 0.0005]
    assert (train_data.dataset.noise, val_data.dataset.noise) == (0.1, 0.1)
    assert (len(val_data.dataset), torch.initial_seed()) == (5000, 7)
    [(_, digit, _)] = train_data  # of 1500 pairs: one batch, one pair dropped
    assert not torch.equal(digit, train_data.dataset[:1499][1])  # shuffled


def test_same_seed_same_weights(model):
    main([*FLAGS, "--out=again"])
    assert_close(torch.load("again/mixvae.pt"), model.state_dict(), atol=0.01, rtol=0)


def test_failed_write_keeps_old_model(model):
    with patch("torch.save"), pytest.raises(FileNotFoundError):  # saves nothing
        main(FLAGS)
    assert_close(torch.load("results/mixvae.pt"), model.state_dict())


@pytest.mark.parametrize("flag", ["epochs=0", "noise=nan", "batch-size=55001", "lr=0"])
def test_wrong_flag(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*FLAGS, f"--{flag}"])
    assert flag.split("=")[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flag", ["--data=none", "--data=bad", "--out=file", "--lr=1"])
def test_fault_ends_in_one_line(flag, monkeypatch):
    write_stand_in("bad", 9, 9)
    Path("bad/MNIST/raw/train-images-idx3-ubyte").write_text("too short")
    Path("file").touch()
    monkeypatch.setattr(torch.Tensor, "log", lambda mse: mse * torch.nan)  # for --lr=1
    monkeypatch.setattr(mixvae.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # no server
    monkeypatch.setattr(sys, "argv", ["mixvae.py", *FLAGS, flag])
    with pytest.raises(SystemExit, match="^mixvae: .*(in none|in bad|file|--lr).*$"):
        runpy.run_path(mixvae.__file__, run_name="__main__")


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
def test_accelerator():
    main(["--epochs=1", "--batch-size=50", "--out=accelerator"])


if __name__ == "__main__":
    write_stand_in(sys.argv[1])
