"""Tests of mixvae.py on drawn images; `python test_mixvae.py DIR` writes a full set."""

import struct
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import mixvae
from mixvae import VAE, MixMNIST, VAELoss, main, psnr, separate, train_model

FLAGS = ["--data=stand-in", "--device=cpu", "--epochs=3", "--batch-size=50"]
COMMAND = [sys.executable, mixvae.__file__, *FLAGS]
torch.manual_seed(0)


def write_images(folder, part, n, height, width, grey):  # rectangles, random labels
    folder.mkdir(parents=True, exist_ok=True)
    images = torch.zeros(n, 28, 28, dtype=torch.uint8)
    for image in images:
        top, left = torch.randint(10, (2,)).tolist()
        image[top : top + height, left : left + width] = grey
    data = struct.pack(">4I", 2051, n, 28, 28) + bytes(images.numpy())
    (folder / f"{part}-images-idx3-ubyte").write_bytes(data)
    data = struct.pack(">2I", 2049, n) + bytes(torch.randint(10, (n,)).tolist())
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(data)


def write_stand_in(root, n_train, n_test):  # thin white digits, large grey garments
    for part, n in (("train", n_train), ("t10k", n_test)):
        write_images(root / "MNIST/raw", part, n, height=14, width=3, grey=255)
        write_images(root / "FashionMNIST/raw", part, n, height=18, width=14, grey=150)


@pytest.fixture(scope="session", autouse=True)  # all tests work in one folder
def run(tmp_path_factory):
    pytest.MonkeyPatch().chdir(tmp_path_factory.mktemp("run"))
    write_stand_in(Path("stand-in"), 7000, 600)
    return subprocess.run(COMMAND, capture_output=True, text=True)


def test_command_line_separates(run):
    assert (run.returncode, len([*Path().glob("results/*")])) == (0, 6), run.stderr
    lines = [line.split() for line in run.stdout.splitlines() if line]
    rows = {name: values for name, *values in lines}
    assert list(rows)[:5] == ["epoch", "1", "2", "3", "PSNR"]
    for low, middle, high in zip(rows["mixture"], rows["decoded"], rows["separated"]):
        assert float(low) < float(middle) < float(high)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_pairs_and_labels_are_those_of_torchvision(split):
    part = {"train": slice(2000), "val": slice(2000, 7000), "test": slice(600)}[split]
    pairs = MixMNIST("stand-in", split)
    for k, dataset in enumerate([mixvae.MNIST, mixvae.FashionMNIST]):
        original = dataset("stand-in", train=split != "test")
        assert_close(pairs[:][1 + k], original.data[part].flatten(1) / 255)
        assert_close(pairs.labels[:, k], original.targets[part])


def test_noise_is_in_the_mixture_alone_and_drawn_anew():
    pairs = MixMNIST("stand-in", noise=0.1)
    mixed, digit, garment = pairs[:]
    assert psnr(mixed, (digit + garment) / 2) == pytest.approx(20, abs=0.02)  # dB
    assert mixed.min() < -0.3  # not clamped
    assert not torch.equal(mixed, pairs[:][0])  # drawn anew
    assert_close(pairs[4][1:], (digit[4], garment[4]))  # one pair
    assert_close(pairs[[4, 5]][1:], pairs[4:6][1:])  # two pairs


def test_model_decodes_means_in_evaluation_and_samples_in_training():
    model, mixed = VAE().eval(), torch.rand(9, 784)
    reconstruction, decoded1, decoded2, mean1, _, mean2, logvar2 = model(mixed)
    assert mean1.shape == logvar2.shape == (9, 32)
    assert_close((decoded1, decoded2), (model.decoder1(mean1), model.decoder2(mean2)))
    assert_close(reconstruction, (decoded1 + decoded2) / 2)
    assert decoded1.mean() < 0.4 < decoded2.mean()  # decoder 1 starts darker
    model.train()
    assert all((a != b).any() for a, b in zip(model(mixed)[1:3], model(mixed)[1:3]))


def test_reparameterize_samples_and_passes_gradients():
    latents = torch.full((2, 99_999), 2.0, requires_grad=True)
    sample = mixvae.reparameterize(latents[0] + 1, latents[1])  # mean 3, logvar 2
    assert torch.var_mean(sample.detach()) == pytest.approx((7.39, 3), abs=0.2)  # e², 3
    assert torch.autograd.grad(sample.sum(), latents)[0].any(dim=1).all()


def test_loss_is_reconstruction_plus_kl():
    latents = torch.randn(4, 9, 32)  # mean1, logvar1, mean2, logvar2
    posterior = Normal(latents[[0, 2]], (latents[[1, 3]] / 2).exp())
    kl = kl_divergence(posterior, Normal(0, 1)).sum().item() / 9
    black = torch.zeros(9, 784)
    outputs = black, black, black + 1, *latents
    mixed, digit, garment = black + 0.1, black + 0.2, black + 0.7
    losses = VAELoss()(outputs, mixed, None, None)  # blind: no sources
    assert losses == pytest.approx((392 + kl, 392, kl))  # 784 · 0.1² / (2 · 0.1²)
    losses = VAELoss(noise=0.1, supervised=True)(outputs, mixed, digit, garment)
    assert losses == pytest.approx((5292 + kl, 5292, kl))  # 392 · (½ (noise) + 2² + 3²)


def test_train_model_cycles_the_rate_on_the_device_and_returns_mean_losses():
    def criterion(*tensors):
        assert all(tensor.is_meta for tensor in tensors)  # have shapes, no values
        rates.append(sgd.param_groups[0]["lr"])
        return 3 * [torch.tensor(1.0, requires_grad=True)]

    rates, model, one_batch = [], torch.nn.Linear(1, 1), [torch.ones(3, 5, 1)]
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = train_model(model, 16 * one_batch, criterion, sgd, 1, one_batch, "meta")
    assert losses == ([1], [1])
    assert (rates[11], rates[15]) == pytest.approx((1, 0), abs=0.001)  # 12 / 16: 75 %


def test_train_model_keeps_the_best_epoch():
    def criterion(weight, *_):  # the model's output for an input of 1
        assert weight.requires_grad == model.training
        return 3 * [-weight.sum() if model.training else (weight - 5).abs().sum()]

    model, data = torch.nn.Linear(1, 1, bias=False), [torch.ones(3, 1, 1)]
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)  # adds the rate: in all about 10
    _, val_losses = train_model(model, data, criterion, sgd, 20, 4 * data, "cpu")
    assert abs(5 - model.weight.item()) == pytest.approx(min(val_losses))


def test_share_residual_by_variance_within_0_and_1():
    mixed = torch.tensor([0.7, 0.9, 0.7, 0.0])
    decoded1 = torch.tensor([0.5, 0.5, 0.0, 0.0])
    decoded2 = torch.tensor([0.5, 0.5, 0.5, 0.0])  # variances 3:1, 3:1, 0:1, 0:0
    digit, garment = mixvae.share_residual(mixed, decoded1, decoded2, noise=0)
    assert_close(digit, torch.tensor([0.8, 1.0, 0.4, 0.0]))  # 0.8, 1.1, 1.4 - 1, 0/0
    assert_close(digit + garment, 2 * mixed)
    digit, garment = mixvae.share_residual(mixed, decoded1, decoded2, noise=1)
    assert (digit[0], garment[0]) == pytest.approx((0.5 + 0.03 / 4.1, 0.5 + 0.01 / 4.1))


def test_refine_fits_each_image_and_obeys_the_prior():
    model, mixed = VAE().eval(), torch.rand(9, 784)
    reconstruction, _, _, mean1, _, mean2, _ = model(mixed)
    z1, z2 = mixvae.refine(model, mixed, noise=0)
    refined = (model.decoder1(z1) + model.decoder2(z2)) / 2
    assert ((refined - mixed).norm(dim=1) < (reconstruction - mixed).norm(dim=1)).all()
    assert_close(mixvae.refine(model, mixed[:1], 0)[0], z1[:1], atol=0.01, rtol=0)
    for z, mean in zip(mixvae.refine(model, mixed, noise=1e6), (mean1, mean2)):
        assert (z.norm(dim=1) < 0.8 * mean.norm(dim=1)).all()  # only the prior is left


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_separate_improves_and_leaves_weights_alone(noise):
    model = VAE()
    model.load_state_dict(weights := torch.load("results/mixvae.pt"))
    mixed, *sources = MixMNIST("stand-in", "test", noise)[:]
    separated = separate(model, mixed, noise)  # sets evaluation mode
    for image, better_image, source in zip(model(mixed)[1:3], separated, sources):
        assert psnr(better_image, source) > psnr(image, source)
    assert_close(model.state_dict(), weights)
    assert {parameter.grad for parameter in model.parameters()} == {None}


def test_samples_and_results_show_the_right_columns(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n - 8, n))  # last 8
    monkeypatch.setattr(mixvae, "draw_grid", spy := Mock())  # path, titles, columns
    model, pairs = VAE().eval(), MixMNIST("stand-in", "test")
    pairs.labels[-8:] = torch.tensor([3, 8])  # class 8 is Bag
    mixvae.draw_samples("samples.png", pairs)
    mixvae.draw_results(Path(), model, pairs)
    samples, results, _, generated = [call.args for call in spy.mock_calls]
    mixed, digit, garment = pairs[-8:]
    assert_close(samples[2], [digit, garment, mixed])
    assert samples[3] == 8 * ["3, Bag"]
    reconstruction, decoded1, decoded2, *_ = model(pairs[:8][0])
    assert results[1][1:] == ["Fashion\nimage", "Number\nimage", "Main\nimage"]
    assert_close(results[2], [reconstruction, decoded2, decoded1, pairs[:8][0]])
    assert [len(images.unique(dim=0)) for images in generated[2]] == [8, 8]


def test_flags_reach_data_loss_training_and_separation(monkeypatch):
    monkeypatch.setattr(mixvae, "MixMNIST", data := Mock(wraps=MixMNIST))
    monkeypatch.setattr(mixvae, "separate", sep := Mock(wraps=separate))
    monkeypatch.setattr(mixvae, "train_model", spy := Mock(return_value=([1], [1])))
    main([*FLAGS, "--lr=0.5", "--noise=0.2", "--supervised", "--out=spied"])
    assert {call.args[2] for call in data.mock_calls + sep.mock_calls} == {0.2}  # noise
    _, batches, loss, adam, epochs, val, device = spy.call_args.args
    assert (loss.noise, loss.supervised, adam.defaults["lr"]) == (0.2, True, 0.5)
    assert (epochs, device, len(batches), len(val[0][0])) == (3, "cpu", 2000 / 50, 5000)
    assert mixvae.parse_arguments([]).noise == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_seed_decides_the_output(seed, run, capsys):
    main([*FLAGS, f"--seed={seed}"])
    assert (capsys.readouterr().out == run.stdout) == (seed == 0)


@pytest.mark.parametrize("flag", ["epochs=0", "noise=nan", "batch-size=1", "lr=0"])
def test_wrong_flag_is_named_in_the_message(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*FLAGS, f"--{flag}"])
    assert flag.split("=")[0] in capsys.readouterr().err.splitlines()[-1]


def test_bad_folder_ends_with_a_message(monkeypatch):
    monkeypatch.setattr(mixvae.MNIST, "mirrors", [])  # no network
    write_stand_in(Path("damaged"), 9, 9)
    Path("damaged/MNIST/raw/train-images-idx3-ubyte").write_text("no images")
    for folder in ("missing", "damaged"):
        with pytest.raises(OSError, match=f"no data in {folder}"):
            main([*FLAGS, f"--data={folder}"])
    Path("file").touch()
    bad = subprocess.run([*COMMAND, "--out=file"], capture_output=True, text=True)
    assert (bad.returncode, bad.stderr[:7], bad.stderr.count("\n")) == (1, "mixvae:", 1)


def test_failed_run_keeps_the_old_model(monkeypatch):
    Path("kept/new.pt").mkdir(parents=True)  # so that no file can be written there
    Path("kept/mixvae.pt").write_text("old model")
    with pytest.raises((OSError, RuntimeError)):
        main([*FLAGS, "--out=kept"])
    monkeypatch.setattr(mixvae, "SIGMA", 0)  # no finite loss
    with pytest.raises(FloatingPointError, match="lower --lr"):
        main([*FLAGS, "--out=kept"])
    assert Path("kept/mixvae.pt").read_text() == "old model"


def test_run_completes_on_an_accelerator():
    device = str(torch.accelerator.current_accelerator())  # or "None"
    try:
        torch.ones(1, device=device)
    except RuntimeError:
        pytest.skip(f"no tensor on {device}")
    main([*FLAGS, f"--device={device}", "--out=accelerator"])


if __name__ == "__main__":
    write_stand_in(Path(sys.argv[1]), 60_000, 10_000)
