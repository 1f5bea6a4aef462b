"""Tests of mixvae.py with drawn images, which `python test_mixvae.py DIR` writes."""

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
from mixvae import VAE, MixMNIST, VAELoss, main, mix, psnr, separate, train_model

FLAGS = ["--data=stand-in", "--device=cpu", "--epochs=3", "--batch-size=50"]
torch.manual_seed(0)


def write_images(folder, part, n, height, width, grey):
    """Write n images of a rectangle and n random labels, in the format of MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    images = torch.zeros(n, 28, 28, dtype=torch.uint8)
    for image in images:
        top, left = torch.randint(28 - height, (2,)).tolist()
        image[top : top + height, left : left + width] = grey
    data = struct.pack(">4I", 2051, n, 28, 28) + bytes(images.numpy())
    (folder / f"{part}-images-idx3-ubyte").write_bytes(data)
    data = struct.pack(">2I", 2049, n) + bytes(torch.randint(10, (n,)).tolist())
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(data)


def write_stand_in(root, n_train, n_test):  # thin white digits, large grey garments
    for part, n in (("train", n_train), ("t10k", n_test)):
        write_images(root / "MNIST/raw", part, n, height=14, width=3, grey=255)
        write_images(root / "FashionMNIST/raw", part, n, height=18, width=14, grey=150)


@pytest.fixture(scope="session", autouse=True)
def run(tmp_path_factory):
    """The command line's run on the stand-in; all tests work in its folder."""
    pytest.MonkeyPatch().chdir(tmp_path_factory.mktemp("run"))
    write_stand_in(Path("stand-in"), 7000, 600)
    command = [sys.executable, mixvae.__file__, *FLAGS]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_command_line_separates(run):
    assert run.returncode == 0, run.stderr
    names = {path.stem for path in Path("results").iterdir()}
    assert names == {"generated", "loss", "mixvae", "results", "samples", "separation"}
    lines = filter(None, map(str.split, run.stdout.splitlines()))
    rows = {name: values for name, *values in lines}
    assert [name for name in rows if name.isdigit()] == ["1", "2", "3"]
    psnrs = zip(rows["mixture"], rows["decoded"], rows["separated"])
    for mixture, decoded, separated in psnrs:  # of digits, of garments
        assert float(mixture) < float(decoded) < float(separated)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_pairs_and_labels_are_those_of_torchvision(split):
    part = {"train": slice(2000), "val": slice(2000, 7000), "test": slice(600)}[split]
    pairs = MixMNIST("stand-in", split)
    for k, dataset in enumerate([mixvae.MNIST, mixvae.FashionMNIST]):
        original = dataset("stand-in", train=split != "test")
        assert_close(pairs[:][1 + k], original.data[part].flatten(1) / 255)
        assert_close(pairs.labels[:, k], original.targets[part])


def test_index_is_an_int_a_slice_or_a_list():
    pairs = MixMNIST("stand-in")
    assert_close(pairs[[4, 5]], pairs[4:6])
    assert_close(pairs[4], tuple(images[4] for images in pairs[:]))


def test_noise_is_added_to_the_average():
    pairs = MixMNIST("stand-in", noise=0.2)
    mixed, digit, garment = pairs[:]
    noise = mixed - (digit + garment) / 2
    assert (noise.mean(), noise.std()) == pytest.approx((0, 0.2), abs=0.001)
    assert mixed.min() < -0.5  # not clamped
    assert digit.min() == garment.min() == 0  # the sources have no noise
    assert not torch.equal(mixed, pairs[:][0])  # drawn anew


def test_model_decodes_means_or_samples():
    model, mixed = VAE().eval(), torch.rand(9, 784)
    reconstruction, *decoded, mean1, _, mean2, logvar2 = model(mixed)
    assert mean1.shape == logvar2.shape == (9, 32)
    assert_close(decoded, [model.decoder1(mean1), model.decoder2(mean2)])
    assert_close(reconstruction, (decoded[0] + decoded[1]) / 2)
    assert decoded[0].mean() < 0.4 < decoded[1].mean()  # decoder 1 starts darker
    model.training = True  # for forward alone, not for batch norm
    for sampled, image in zip(model(mixed)[1:3], decoded):
        assert (sampled - image).abs().mean() > 0.001


def test_reparameterize():
    mean = torch.full((99_999,), 3.0, requires_grad=True)
    logvar = torch.full((99_999,), 4.0).log().requires_grad_()
    sample = mixvae.reparameterize(mean, logvar)
    assert torch.std_mean(sample.detach()) == pytest.approx((2, 3), abs=0.03)
    sample.sum().backward()
    assert (mean.grad * logvar.grad).all()


def test_reconstruction_loss_and_psnr_by_hand():
    black, dot = torch.zeros(2, 2, 784)
    dot[0, 5] = 0.1
    assert_close(mixvae.reconstruction_loss(black, dot), torch.tensor([0.5, 0]))
    assert_close(mixvae.reconstruction_loss(black, dot, 0.1), torch.tensor([0.25, 0]))
    assert psnr(black, black + 0.1) == pytest.approx(20)


def test_kl_divergence_is_that_of_torch():
    mean, logvar = torch.randn(2, 9, 32)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0, 1))
    assert_close(mixvae.kl_divergence(mean, logvar), expected.sum(dim=1))


def test_loss_is_reconstruction_plus_kl():
    black, zeros = torch.zeros(2, 784), torch.zeros(2, 32)
    latents = zeros + 1, zeros, zeros + 2, zeros  # KL: 16 + 64
    outputs = black, black + 0.2, black + 0.6, *latents
    mixed, digit, garment = black + 0.1, black + 0.4, black + 0.9
    losses = VAELoss()(outputs, mixed, None, None)  # blind: no sources
    assert losses == pytest.approx((392 + 80, 392, 80))  # 784 pixels · 0.5
    losses = VAELoss(noise=0.1, supervised=True)(outputs, mixed, digit, garment)
    recon_loss = 392 / 2 + 4 * 392 + 9 * 392  # noise is in the mixture alone
    assert losses == pytest.approx((recon_loss + 80, recon_loss, 80))


def test_schedule_and_best_epoch():
    def criterion(output, mixed, digit, garment):
        return 3 * [(digit - output).abs().sum()]

    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    # All inputs are 1. Each step adds the rate to the weight: it passes 9, but not 99.
    data = 2 * [torch.tensor([1.0, 99.0, 0.0]).view(3, 1, 1)]
    val_data = [torch.tensor([1.0, 9.0, 0.0]).view(3, 1, 1)]
    losses, val_losses = train_model(model, data, criterion, sgd, 20, val_data, "cpu")
    rates = -torch.tensor(losses).diff() / 2
    assert rates.argmax() == 14  # of 20 epochs with two steps: 75 %
    assert rates[[0, 14, 18]].tolist() == pytest.approx([0.05, 1, 0.1], abs=0.03)
    assert min(val_losses) == pytest.approx(abs(9 - model.weight.item()))
    assert min(val_losses) < val_losses[-1] - 1


def test_epoch_trains_and_validates_on_the_device():
    def criterion(output, *images):  # the loss is the number of mixtures
        devices = {tensor.device.type for tensor in (output, *images)}
        calls.append((len(output), model.training, output.requires_grad, devices))
        return 3 * [torch.tensor(float(len(output)), requires_grad=True)]

    calls, model = [], torch.nn.Linear(1, 1)  # "meta": a device on every machine
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    two, four, five = torch.ones(3, 2, 1), torch.ones(3, 4, 1), torch.ones(3, 5, 1)
    losses = train_model(model, [two, four], criterion, sgd, 2, [five], "meta")
    assert losses == ([3, 3], [5, 5])  # means over the batches
    training = [(2, True, True, {"meta"}), (4, True, True, {"meta"})]
    assert calls == 2 * [*training, (5, False, False, {"meta"})]


def test_share_residual():
    mixed, noisy = torch.tensor([[0.7, 0.9, 0.9, 0], [0.7, 2.9, -1.9, 0]])
    decoded = torch.tensor([[0.5, 0.9, 0, 0], [0.5, 0.5, 0.5, 0]])
    # The residual 0.4 is shared 3 : 1. Where one is clamped, the sum stays 2 mixed.
    images = torch.stack(mixvae.share_residual(mixed, *decoded, noise=0))
    assert_close(images, torch.tensor([[0.8, 1, 0.8, 0], [0.6, 0.8, 1, 0]]))
    # (2 · noise)² is 0.1, as are both variances: half of the 0.4 is noise. Clamped.
    images = torch.stack(mixvae.share_residual(noisy, *decoded, noise=0.025**0.5))
    assert_close(images, torch.tensor([[0.65, 1, 0, 0], [0.55, 1, 0, 0]]))


def test_refine_follows_reconstruction_and_prior():
    model, mixed = VAE().eval(), torch.rand(9, 784)
    reconstruction, _, _, mean1, _, mean2, _ = model(mixed)
    z1, z2 = mixvae.refine(model, mixed, noise=0)
    refined = mix(model.decoder1(z1), model.decoder2(z2))
    assert ((refined - mixed).norm(dim=1) < (reconstruction - mixed).norm(dim=1)).all()
    assert_close(mixvae.refine(model, mixed[7:8], 0)[0], z1[7:8], atol=0.01, rtol=0)
    for z, mean in zip(mixvae.refine(model, mixed, noise=1e6), (mean1, mean2)):
        assert (z.norm(dim=1) < mean.norm(dim=1)).all()  # only the prior is left


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_separate_improves_and_leaves_weights_alone(noise):
    model, trained = VAE().eval(), torch.load("results/mixvae.pt")
    model.load_state_dict(trained)
    mixed, *sources = MixMNIST("stand-in", "test", noise)[:]
    decoded = model(mixed)[1:3]
    with torch.no_grad():
        separated = separate(model.train(), mixed, noise)
    for image, better_image, source in zip(decoded, separated, sources):
        assert psnr(better_image, source) > psnr(image, source) + 0.5
    assert_close(model.state_dict(), trained)
    assert {parameter.grad for parameter in model.parameters()} == {None}


def test_figures_of_results(monkeypatch):
    monkeypatch.setattr(mixvae, "draw_grid", spy := Mock())
    model, pairs = VAE().eval(), MixMNIST("stand-in", "test")
    mixed, digit, garment = pairs[:8]
    reconstruction, decoded1, decoded2, *_ = model(mixed)
    separated1, separated2 = separate(model, mixed)
    mixvae.draw_results(Path(), model, pairs)
    results, separation, generated = [call.args for call in spy.mock_calls]
    assert_close(results[2], [reconstruction, decoded2, decoded1, mixed])
    columns = [mixed, decoded1, separated1, digit, decoded2, separated2, garment]
    assert_close(separation[2], columns)
    assert [title[0] for title in results[1] + separation[1]] == [*"RFNMMDDDGGG"]
    assert [len(images.unique(dim=0)) for images in generated[2]] == [8, 8]


def test_figure_of_samples(monkeypatch):
    index = [1, 6, 1, 8, 0, 3, 3, 9]
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(index))
    monkeypatch.setattr(mixvae, "draw_grid", spy := Mock())
    mixvae.draw_samples("samples.png", pairs := MixMNIST("stand-in"))
    mixed, digit, garment = pairs[index]
    _, titles, columns, captions = spy.call_args.args
    assert titles == ["Digit", "Garment", "Mixture"]
    assert_close(columns, [digit, garment, mixed])
    for caption, (n, k) in zip(captions, pairs.labels[index].tolist()):
        assert caption == f"{n}, {mixvae.FashionMNIST.classes[k]}"


def test_flags_reach_data_loss_and_training(monkeypatch):
    monkeypatch.setattr(mixvae, "train_model", spy := Mock(return_value=([1], [1])))
    monkeypatch.setattr(mixvae, "print_psnr", table := Mock())
    flags = "--noise=.2 --supervised --lr=.5 --batch-size=1900 --out=spied"
    main([*FLAGS, *flags.split()])
    _, train_data, criterion, adam, epochs, val_data, device = spy.call_args.args
    assert (epochs, device, adam.param_groups[0]["lr"]) == (3, "cpu", 0.5)
    assert (criterion.noise, criterion.supervised) == (0.2, True)
    test_set = table.call_args.args[1]
    assert (train_data.dataset.noise, test_set.noise, len(test_set)) == (0.2, 0.2, 600)
    assert len(val_data[0][0]) == 5000
    assert val_data[0][0].min() < -0.5  # noise here, too
    [(_, digit, _)] = train_data  # of 2000 pairs: one batch, 100 pairs dropped
    assert not torch.equal(digit, train_data.dataset[:1900][1])  # shuffled


def test_seed_decides_on_the_weights():
    weights = []
    for seed in (1, 1, 2):
        main([*FLAGS, f"--seed={seed}", "--out=seeds"])
        weights.append(torch.load("seeds/mixvae.pt")["encoder.head.weight"])
    assert_close(weights[0], weights[1], atol=0.01, rtol=0)
    assert (weights[0] - weights[2]).abs().max() > 0.1


@pytest.mark.parametrize("flag", ["epochs=0", "noise=nan", "batch-size=1", "lr=0"])
def test_wrong_flag(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*FLAGS, f"--{flag}"])
    assert flag.split("=")[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data=none", "no data in none"),
        ("--data=bad", "no data in bad"),
        ("--out=file", "file"),
        ("--lr=1", "not finite: lower --lr"),
    ],
)
def test_fault_has_a_message(flag, message, monkeypatch):
    write_stand_in(Path("bad"), 9, 9)
    Path("bad/MNIST/raw/train-images-idx3-ubyte").write_text("too short")
    Path("file").touch()
    monkeypatch.setattr(mixvae, "SIGMA", 0 if flag == "--lr=1" else 0.1)
    monkeypatch.setattr(mixvae.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # no server
    with pytest.raises((OSError, FloatingPointError), match=message):
        main([*FLAGS, flag])


def test_fault_ends_the_program_in_one_line():
    Path("file").touch()
    command = [sys.executable, mixvae.__file__, *FLAGS, "--out=file"]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert run.stderr.startswith("mixvae: ")


def test_failed_write_keeps_the_old_model(monkeypatch):
    before = Path("results/mixvae.pt").read_bytes()
    monkeypatch.setattr(torch, "save", Mock())  # writes nothing
    with pytest.raises(FileNotFoundError):
        main(FLAGS)
    assert Path("results/mixvae.pt").read_bytes() == before


def test_accelerator():
    # On the device "meta" tensors have no values.
    device = torch.accelerator.current_accelerator() or torch.device("meta")
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        pytest.skip("no accelerator that holds a tensor")
    main([*FLAGS, f"--device={device.type}", "--out=accelerator"])


if __name__ == "__main__":
    write_stand_in(Path(sys.argv[1]), 60_000, 10_000)
