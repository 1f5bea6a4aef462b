"""Tests of mixvae.py on rectangles; `python test_mixvae.py DIR` writes 70,000 pairs."""

import struct
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.distributions import Normal, kl_divergence  # not mixvae's
from torch.testing import assert_close

import mixvae
from mixvae import VAE, MixMNIST, VAELoss, main, psnr, refine, separate, train_model

FLAGS = ["--data=stand-in", "--device=cpu", "--epochs=2", "--batch-size=50"]
SCRIPT = [sys.executable, mixvae.__file__, *FLAGS]
torch.manual_seed(0)


def write_images(folder, part, n, height, width, grey):  # in MNIST's file format
    folder.mkdir(parents=True, exist_ok=True)
    images = torch.zeros(n, 28, 28, dtype=torch.uint8)
    for image, (top, left) in zip(images, torch.randint(10, (n, 2))):
        image[top : top + height, left : left + width] = grey
    data = struct.pack(">4I", 2051, n, 28, 28) + bytes(images.numpy())  # kind, sizes
    (folder / f"{part}-images-idx3-ubyte").write_bytes(data)
    data = struct.pack(">2I", 2049, n) + bytes(torch.randint(10, (n,)).tolist())
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(data)


def write_stand_in(root, n_train, n_test):  # thin white digits, large grey garments
    for part, n in (("train", n_train), ("t10k", n_test)):
        write_images(root / "MNIST/raw", part, n, height=14, width=3, grey=255)
        write_images(root / "FashionMNIST/raw", part, n, height=18, width=14, grey=150)


@pytest.fixture(scope="session", autouse=True)  # one folder, one run, shared
def run(tmp_path_factory):
    pytest.MonkeyPatch().chdir(tmp_path_factory.mktemp("run"))  # for the whole session
    write_stand_in(Path("stand-in"), 7000, 600)  # 7000: 2000 train, 5000 val
    return subprocess.run(SCRIPT, capture_output=True, text=True)


def test_command_line_separates(run, capsys):  # and writes five figures and the model
    assert (run.returncode, len([*Path().glob("results/*")])) == (0, 6), run.stderr
    main([*FLAGS, "--noise=0.1", "--out=noisy"])
    for output in (run.stdout, capsys.readouterr().out):  # without and with noise
        rows = {row.split()[0]: row.split()[1:] for row in output.split("\n") if row}
        assert list(rows)[:4] == ["epoch", "1", "2", "PSNR"]  # keys: first words
        for low, mid, high in zip(rows["mixture"], rows["decoded"], rows["separated"]):
            assert float(low) < float(mid) < float(high)  # dB; digit, then garment


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
    mixed, digit, garment = pairs[:]  # PSNR: 10 log10(1 / 0.1²) = 20 dB
    assert psnr(mixed, (digit + garment) / 2) == pytest.approx(20, abs=0.02)
    assert not torch.equal(mixed, pairs[:][0])  # drawn anew
    assert_close(pairs[4][1:], (digit[4], garment[4]))  # one pair; sources: no noise
    assert_close(pairs[[4, 5]][1:], pairs[4:6][1:])  # two pairs


def test_model_decodes_means_in_evaluation_and_samples_in_training():
    model, mixed = VAE().eval(), torch.rand(9, 784)
    reconstruction, decoded1, decoded2, mean1, _, mean2, logvar2 = model(mixed)
    assert mean1.shape == logvar2.shape == (9, 32)
    assert_close((decoded1, decoded2), (model.decoder1(mean1), model.decoder2(mean2)))
    assert_close(reconstruction, (decoded1 + decoded2) / 2)
    assert decoded1.mean() < 0.4 < decoded2.mean()  # decoder 1 starts darker
    model.train()  # twice the same batch: only the samples differ
    assert all((a != b).any() for a, b in zip(model(mixed)[1:3], model(mixed)[1:3]))


def test_reparameterize_samples_and_passes_gradients():
    latents = torch.tensor([[3.0], [2.0]], requires_grad=True)  # mean, logvar
    sample = mixvae.reparameterize(*latents.expand(2, 100_000))  # two long rows
    assert torch.var_mean(sample.detach()) == pytest.approx((7.39, 3), abs=0.2)  # e², 3
    assert torch.autograd.grad(sample.sum(), latents)[0].all()  # both nonzero


def test_loss_is_reconstruction_plus_kl():
    mean, logvar = torch.randn(2, 2, 9, 32)  # each (2 latents, 9 images, 32)
    kl = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0, 1)).sum().item() / 9
    zero, one = torch.zeros(9, 2), torch.ones(9, 2)  # 2 pixels off by x: (x / SIGMA)²
    outputs = zero + 0.4, zero + 0.2, one + 0.3, mean[0], logvar[0], mean[1], logvar[1]
    assert VAELoss()(outputs, zero, None, None) == pytest.approx((16 + kl, 16, kl))
    losses = VAELoss(noise=0.1, supervised=True)(outputs, zero, zero, one)
    assert losses == pytest.approx((21 + kl, 21, kl))  # 4² / 2 + 2² + 3²; noise = SIGMA


def test_train_model_cycles_the_rate_and_uses_the_device():
    def criterion(*tensors):  # output, mixed, digit, garment: all off the CPU
        assert all(tensor.is_meta for tensor in tensors)  # "meta": every machine has it
        rates.append(sgd.param_groups[0]["lr"])  # four in training, two in validation
        return 3 * [torch.tensor(1.0, requires_grad=True)]  # total, reconstruction, KL

    rates, model, batch = [], torch.nn.Linear(1, 1), 3 * [torch.ones(1, 1)]
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = train_model(model, 4 * [batch], criterion, sgd, 1, 2 * [batch], "meta")
    assert losses == ([1], [1])  # means, not sums
    assert rates[3] < 0.001 < rates[0] < rates[1] < rates[2] == 1  # up for 3 steps of 4


def test_train_model_keeps_the_best_epoch():
    def criterion(output, *_):  # the weight, as the input is 1
        assert model.training or not output.requires_grad  # no gradients in validation
        return 3 * [-output.sum() if model.training else (output - 5).abs().sum()]

    model, batch = torch.nn.Linear(1, 1, bias=False), 3 * [torch.ones(1, 1)]
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)  # += rate: from ~0 past 5 to ~10
    _, val_losses = train_model(model, [batch], criterion, sgd, 20, [batch], "cpu")
    assert abs(model.weight.item() - 5) == pytest.approx(min(val_losses))


def test_share_residual_in_proportion_to_variances():
    mixed, decoded = torch.tensor(0.7), torch.tensor(0.5)  # variances 0.075, 0.025
    separated = mixvae.share_residual(mixed, decoded, decoded, noise=0)
    assert separated == pytest.approx((0.8, 0.6))  # residual 0.4, split 3 : 1
    separated = mixvae.share_residual(mixed, decoded, decoded, noise=0.1**0.5 / 2)
    assert separated == pytest.approx((0.65, 0.55))  # (2 · noise)² = 0.1 takes half


def test_share_residual_keeps_the_sum_and_the_range():  # without noise
    mixed, decoded1, decoded2 = torch.randint(11, (3, 9, 784)) / 10  # 0, 0.1, ..., 1
    digit, garment = mixvae.share_residual(mixed, decoded1, decoded2, noise=0)
    assert_close(digit + garment, 2 * mixed)
    assert all(0 <= image.min() <= image.max() <= 1 for image in (digit, garment))


def test_refine_fits_each_image_and_obeys_the_prior():
    model, mixed = VAE().eval(), torch.rand(9, 784)
    reconstruction, _, _, mean1, _, mean2, _ = model(mixed)
    z1, z2 = refine(model, mixed, noise=0)
    refined = (model.decoder1(z1) + model.decoder2(z2)) / 2
    assert ((refined - mixed).norm(dim=1) < (reconstruction - mixed).norm(dim=1)).all()
    assert (refine(model, mixed[:1], 0)[0] - z1[:1]).abs().max() < 0.01  # same alone
    for z, mean in zip(refine(model, mixed, noise=1e6), (mean1, mean2)):  # all noise:
        assert (z.norm(dim=1) < 0.8 * mean.norm(dim=1)).all()  # the prior shrinks z


def test_separate_hands_on_the_noise_and_leaves_weights_alone():
    model, mixed = VAE(), torch.rand(9, 784)  # training mode: batch norm would move
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    digit, _ = separate(model, mixed, noise=1e6)  # all noise: prior alone, no residual
    assert_close(digit, model.decoder1(refine(model, mixed, noise=1e6)[0]))
    assert_close(model.state_dict(), weights)
    assert {parameter.grad for parameter in model.parameters()} == {None}


def test_samples_show_sources_mixture_and_classes(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n - 8, n))  # last 8
    monkeypatch.setattr(mixvae, "draw_grid", spy := Mock())
    pairs = MixMNIST("stand-in", "test")
    pairs.labels[-8:] = torch.tensor([3, 8])  # class 8 is Bag
    mixvae.draw_samples("samples.png", pairs)
    _, titles, (digit, garment, mixed), captions = spy.call_args.args
    assert_close((mixed, digit, garment), pairs[-8:])
    assert (titles, captions) == (["Digit", "Garment", "Mixture"], 8 * ["3, Bag"])


def test_figures_show_results_separation_and_generated_images(monkeypatch):
    monkeypatch.setattr(mixvae, "draw_grid", spy := Mock())
    model, pairs = VAE(), MixMNIST("stand-in", "test", noise=0.2)
    mixvae.draw_results(Path(), model, pairs)  # three grids; sets evaluation mode
    _, titles, columns = zip(*[call.args for call in spy.mock_calls])  # per figure
    (reconstruction, decoded2, decoded1, mixed), separation, generated = columns
    assert titles[0][1:] == ["Fashion\nimage", "Number\nimage", "Main\nimage"]
    assert_close((reconstruction, decoded1, decoded2), model(mixed)[:3])
    assert_close((separation[2], separation[5]), separate(model, mixed, noise=0.2))
    assert [len(images.unique(dim=0)) for images in generated] == [8, 8]


def test_flags_reach_data_loss_optimizer_and_training(monkeypatch):
    monkeypatch.setattr(mixvae, "MixMNIST", datasets := Mock(wraps=MixMNIST))
    monkeypatch.setattr(mixvae, "train_model", spy := Mock(return_value=([1], [1])))
    main([*FLAGS, "--lr=0.5", "--noise=0.2", "--supervised", "--out=spied"])
    assert [call.args[2] for call in datasets.mock_calls] == [0.2, 0.2, 0.2]  # noise
    _, batches, loss, adam, epochs, val, device = spy.call_args.args  # of train_model
    assert (loss.noise, loss.supervised, adam.defaults["lr"]) == (0.2, True, 0.5)
    assert (epochs, device, len(batches), len(val[0][0])) == (2, "cpu", 2000 / 50, 5000)
    assert mixvae.parse_arguments([]).noise == 0  # no noise by default


@pytest.mark.parametrize("seed", [0, 1])
def test_seed_decides_the_output(seed, run, capsys):
    main([*FLAGS, f"--seed={seed}"])
    assert (capsys.readouterr().out == run.stdout) == (seed == 0)  # the run's is 0


@pytest.mark.parametrize("flag", ["epochs=0", "noise=nan", "batch-size=1", "lr=0"])
def test_wrong_flag_is_named_in_the_message(flag, capsys):
    with pytest.raises(SystemExit, match="2"):  # exit status
        main([*FLAGS, f"--{flag}"])
    assert flag.split("=")[0] in capsys.readouterr().err.splitlines()[-1]


def test_bad_folder_ends_with_a_message(monkeypatch):  # --data (two ways), then --out
    monkeypatch.setattr(mixvae.MNIST, "mirrors", [])  # nowhere to download from
    write_stand_in(Path("damaged"), 9, 9)
    Path("damaged/MNIST/raw/train-images-idx3-ubyte").write_text("not IDX")
    for folder in ("missing", "damaged"):
        with pytest.raises(OSError, match=f"no data in {folder}"):
            main([*FLAGS, f"--data={folder}"])
    bad = subprocess.run([*SCRIPT, f"--out={__file__}"], capture_output=True, text=True)
    assert (bad.returncode, bad.stderr[:7], bad.stderr.count("\n")) == (1, "mixvae:", 1)


def test_failed_run_keeps_the_old_model(monkeypatch):
    Path("kept/new.pt").mkdir(parents=True)  # a folder: torch.save fails
    Path("kept/mixvae.pt").write_text("old model")
    with pytest.raises((OSError, RuntimeError)):
        main([*FLAGS, "--out=kept"])
    monkeypatch.setattr(mixvae, "SIGMA", 0)  # no finite loss
    with pytest.raises(FloatingPointError, match="lower --lr"):
        main([*FLAGS, "--out=kept"])
    assert Path("kept/mixvae.pt").read_text() == "old model"


def test_run_completes_on_an_accelerator():
    try:
        torch.ones(1, device=(device := str(torch.accelerator.current_accelerator())))
    except RuntimeError:  # none (str: "None"), or none that works
        pytest.skip("no accelerator")
    main([*FLAGS, f"--device={device}", "--out=accelerator"])


if __name__ == "__main__":
    write_stand_in(Path(sys.argv[1]), 60_000, 10_000)  # for --data=DIR
