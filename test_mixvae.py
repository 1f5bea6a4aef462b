"""Tests of mixvae.py, without a network and without the real data.

    python -m pytest               runs them on small data sets of drawn digits and garments
    python test_mixvae.py DIR      leaves a full-sized stand-in data folder, for `python mixvae.py --data DIR`
"""
import gzip, hashlib, math, os, re, socket, struct, subprocess, sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.datasets import MNIST, FashionMNIST

import mixvae
from mixvae import VAE, MixMNIST, VAELoss, finish, main, make_loader, separate, train_model

HERE = Path(__file__).resolve().parent

# ---- the stand-in data: boxes (top, bottom, left, right, grey) on a 28 x 28 canvas, moved and turned at random --------
SEGMENTS = [(4, 6, 9, 19, 1), (5, 14, 7, 9, 1), (5, 14, 19, 21, 1), (13, 15, 9, 19, 1), (14, 23, 7, 9, 1),
            (14, 23, 19, 21, 1), (22, 24, 9, 19, 1)]  # of a seven-segment digit, from the top to the bottom
DIGITS = [[SEGMENTS[int(s)] for s in lit] for lit in "012456 25 02346 02356 1235 01356 013456 025 0123456 012356".split()]
SLEEVES, LONG_SLEEVES = [(5, 11, 2, 26, .6)], [(5, 22, 2, 7, .5), (5, 22, 21, 26, .5)]
GARMENTS = [SLEEVES + [(5, 24, 8, 20, .7)], [(3, 26, 8, 13, .6), (3, 26, 15, 20, .6), (3, 8, 8, 20, .7)],
            LONG_SLEEVES + [(4, 24, 7, 21, .6)], [(3, 13, 10, 18, .7), (13, 26, 7, 21, .6)],
            LONG_SLEEVES + [(3, 26, 7, 13, .7), (3, 26, 15, 21, .7)], [(20, 23, 3, 26, .8), (12, 20, 18, 21, .6)],
            SLEEVES + [(4, 25, 8, 20, .5), (4, 25, 13, 15, .9)], [(15, 22, 3, 25, .7), (12, 16, 14, 24, .5)],
            [(11, 25, 4, 24, .7), (5, 11, 9, 11, .5), (5, 11, 17, 19, .5)], [(17, 24, 3, 24, .7), (5, 18, 14, 24, .6)]]


def drawn(shapes, labels, generator):
    """Images (N, 28, 28), uint8, of the shapes that `labels` (N,) name, each moved, scaled, turned, shaded at random."""
    canvas = torch.zeros(len(shapes), 28, 28)
    for image, boxes in zip(canvas, shapes):
        for top, bottom, left, right, grey in boxes:
            image[top:bottom, left:right] = grey
    random = 2 * torch.rand(5, len(labels), generator=generator) - 1
    angle, scale, (right, down), light = 0.2 * random[0], 1.1 + 0.15 * random[1], 0.15 * random[2:4], 0.85 + 0.15 * random[4]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)], 1)  # (N, 2, 3)
    chunks = [F.grid_sample(canvas[i][:, None], F.affine_grid(t, [len(i), 1, 28, 28], align_corners=False),
                            align_corners=False)[:, 0] * b[:, None, None]
              for i, t, b in zip(labels.split(5000), theta.split(5000), light.split(5000))]
    return (255 * torch.cat(chunks)).round().clamp(0, 255).byte()


def write_stand_in(root, n_train=60_000, n_test=10_000, archives=False):
    """Write drawn MNIST and Fashion-MNIST files into `root`, in torchvision's layout; returns their md5 sums by name."""
    generator, md5 = torch.Generator().manual_seed(0), {}
    for dataset, shapes in (("MNIST", DIGITS), ("FashionMNIST", GARMENTS)):
        raw = Path(root, dataset, "raw")
        raw.mkdir(parents=True, exist_ok=True)
        for name, n in (("train", n_train), ("t10k", n_test)):
            labels = torch.randint(10, (n,), generator=generator)
            images = drawn(shapes, labels, generator)
            for file, header, content in ((f"{name}-images-idx3-ubyte", struct.pack(">4I", 2051, n, 28, 28), images),
                                          (f"{name}-labels-idx1-ubyte", struct.pack(">2I", 2049, n), labels.byte())):
                content = header + content.numpy().tobytes()
                (raw / file).write_bytes(content)
                if archives:
                    packed = gzip.compress(content)
                    (raw / f"{file}.gz").write_bytes(packed)
                    md5[dataset, f"{file}.gz"] = hashlib.md5(packed).hexdigest()
    return md5


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A data folder of 600 training and 60 test pairs."""
    folder = tmp_path_factory.mktemp("data")
    write_stand_in(folder, 600, 60)
    return folder


@pytest.fixture
def offline(monkeypatch):
    """No data set can be downloaded: the only mirror is a port of this machine on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}/"
    for dataset in (MNIST, FashionMNIST):
        monkeypatch.setattr(dataset, "mirrors", [nobody])


@pytest.fixture(autouse=True)
def restored():
    """`main` sets these for the whole process."""
    yield
    torch.set_float32_matmul_precision("highest")
    socket.setdefaulttimeout(None)


def train(root, epochs=1, criterion=None, seed=0, lr=8e-3, train_set=None):
    torch.manual_seed(seed)
    model = VAE()
    losses = train_model(model, make_loader(train_set or MixMNIST(root), 64, shuffle=True), criterion or VAELoss(),
                         torch.optim.Adam(model.parameters(), lr=lr), epochs, make_loader(MixMNIST(root, "val"), 64), "cpu")
    return model, losses


def same(model1, model2):
    return all(torch.equal(a, b) for a, b in zip(model1.state_dict().values(), model2.state_dict().values(), strict=True))


# ---- data ------------------------------------------------------------------------------------------------------------
def test_mixture_is_the_average_of_corresponding_images(root):
    digits, garments = MNIST(root), FashionMNIST(root)
    data = MixMNIST(root)
    assert len(data) == 550 and len(MixMNIST(root, "val")) == 50 and len(MixMNIST(root, "test")) == 60
    mixed, sources = data[7]
    assert mixed.shape == (784,) and sources.shape == (2, 784) and mixed.dtype == sources.dtype == torch.float32
    assert torch.allclose(sources[0], digits.data[7].flatten() / 255) and sources.max() <= 1
    assert torch.allclose(mixed, digits.data[7].flatten() / 510 + garments.data[7].flatten() / 510)
    assert data.labels[7].tolist() == [digits.targets[7], garments.targets[7]] and data.labels.shape == (550, 2)
    assert torch.allclose(MixMNIST(root, "val")[0][1][1], garments.data[550].flatten() / 255)
    assert torch.allclose(MixMNIST(root, "test")[3][1][0], MNIST(root, train=False).data[3].flatten() / 255)


def test_a_list_of_indices_gives_the_items_as_a_batch(root):
    data = MixMNIST(root)
    mixed, sources = data[[5, 0, 9]]
    assert mixed.shape == (3, 784) and sources.shape == (3, 2, 784)
    for row, index in enumerate([5, 0, 9]):
        assert torch.equal(mixed[row], data[index][0]) and torch.equal(sources[row], data[index][1])


def test_noise_is_on_the_mixture_alone(root):
    clean = MixMNIST(root)[:][0]
    noisy = MixMNIST(root, noise=0.2)
    (first, sources), (second, _) = noisy[:], noisy[:]
    assert torch.equal(sources, MixMNIST(root)[:][1]) and 0 <= first.min() and first.max() <= 1
    assert not torch.equal(first, second)  # drawn afresh for training
    middle = (clean > 0.45) & (clean < 0.55)  # where next to nothing is clamped
    assert (first - clean)[middle].std().item() == pytest.approx(0.2, rel=0.05)
    for split in ("val", "test"):  # and the same every time otherwise, however the items are asked for
        data = MixMNIST(root, split, noise=0.2)
        assert torch.equal(data[:][0], MixMNIST(root, split, noise=0.2)[:][0]) and torch.equal(data[3][0], data[[1, 3]][0][1])


def test_loader_visits_every_pair_once(root):
    data = MixMNIST(root)
    batches = [sources for _, sources in make_loader(data, 100, shuffle=True)]
    assert [len(batch) for batch in batches] == [100] * 5 + [50] and len(make_loader(data, 100)) == 6
    shuffled, ordered = torch.cat(batches), torch.cat([sources for _, sources in make_loader(data, 100)])
    assert not torch.equal(shuffled, ordered) and torch.equal(ordered, data[:][1])
    assert torch.allclose(shuffled.sum(dim=0), ordered.sum(dim=0), atol=1e-3)


# ---- model and loss --------------------------------------------------------------------------------------------------
def test_shapes_and_ranges():
    torch.manual_seed(0)
    model, mixed = VAE(), torch.rand(5, 784)
    reconstruction, source1, source2, *latents = model(mixed)
    assert len(latents) == 4 and len({latent.shape for latent in latents}) == 1 and latents[0].shape[0] == 5
    for image in (reconstruction, source1, source2):
        assert image.shape == (5, 784) and 0 <= image.min() and image.max() <= 1
    assert torch.allclose(reconstruction, source1 / 2 + source2 / 2)
    assert not torch.equal(model(mixed)[0], model(mixed)[0])  # training mode samples
    model.eval()
    assert torch.equal(model(mixed)[0], model(mixed)[0])  # evaluation mode uses the means,
    assert torch.equal(model(mixed)[1], model.decoder1(model(mixed)[3]))  # latent 1 for decoder 1


def outputs_and_sources():
    torch.manual_seed(1)
    images, latents = torch.rand(3, 6, 784), torch.randn(4, 6, 32)
    return (*images, *latents), torch.rand(6, 2, 784)


def test_kl_is_that_of_torch_distributions():
    outputs, sources = outputs_and_sources()
    mean1, logvar1, mean2, logvar2 = outputs[3:]
    prior = torch.distributions.Normal(0, 1)
    expected = sum(torch.distributions.kl_divergence(torch.distributions.Normal(mean, logvar.exp().sqrt()), prior).sum() / 6
                   for mean, logvar in ((mean1, logvar1), (mean2, logvar2)))
    assert VAELoss()(outputs, sources)[2].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("supervised", [False, True])
def test_loss_is_the_formula_written_out(supervised):
    outputs, sources = outputs_and_sources()
    total, reconstruction, kl = (value.item() for value in VAELoss(supervised)(outputs, sources))
    pairs = [(outputs[0], [(digit + garment) / 2 for digit, garment in sources])]
    if supervised:
        pairs += [(outputs[1], [digit for digit, _ in sources]), (outputs[2], [garment for _, garment in sources])]
    expected = 0
    for images, targets in pairs:
        mse = sum(((image - target) ** 2).sum().item() for image, target in zip(images, targets)) / (6 * 784)
        # minus the log-density of a Gaussian with that variance, an image, without its constant
        density = torch.distributions.Normal(images, math.sqrt(mse)).log_prob(torch.stack(targets)).sum().item() / 6
        assert -density == pytest.approx(784 / 2 * (math.log(mse) + math.log(2 * math.pi) + 1), rel=1e-4)
        expected += 784 / 2 * math.log(mse)
    assert reconstruction == pytest.approx(expected, rel=1e-5) and total == pytest.approx(reconstruction + kl, rel=1e-5)


# ---- training --------------------------------------------------------------------------------------------------------
def test_training_is_blind(root):
    other = MixMNIST(root)
    swap = torch.rand(len(other), 784) < 0.5  # other sources, pixel by pixel, of the very same mixtures
    other.images = torch.where(swap[:, None], other.images.flip(1), other.images)
    assert not torch.equal(other[:][1], MixMNIST(root)[:][1]) and torch.equal(other[:][0], MixMNIST(root)[:][0])
    assert same(train(root, 2)[0], train(root, 2, train_set=other)[0])
    assert not same(train(root)[0], train(root, criterion=VAELoss(supervised=True))[0])


def test_best_state_is_kept_and_restored(root):
    class Rising(VAELoss):
        """A validation loss that is lowest in the second of four epochs."""
        values, weights, seen = iter([-5., -7., -6., 3.]), [], None

        def forward(self, outputs, sources):
            total, reconstruction, kl = super().forward(outputs, sources)
            if not total.requires_grad:  # validation, of a single batch
                total = torch.tensor(next(self.values))
            return total, reconstruction, kl

    class Recorder(VAE):
        """Remembers its weights at each validation."""
        def eval(self):
            Rising.weights.append({name: value.clone() for name, value in self.state_dict().items()})
            return super().eval()

    torch.manual_seed(0)
    model, data = Recorder(), make_loader(MixMNIST(root), 64, shuffle=True)
    _, val_losses = train_model(model, data, Rising(), torch.optim.Adam(model.parameters(), lr=1e-3), 4,
                                make_loader(MixMNIST(root, "val"), 50), "cpu")
    assert val_losses == [-5, -7, -6, 3]
    assert all(torch.equal(value, Rising.weights[1][name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, Rising.weights[3][name]) for name, value in model.state_dict().items())


def test_same_seed_same_result_and_validation_disturbs_nothing(root):
    (model, losses), (again, losses_again), (other, _) = train(root, 2), train(root, 2), train(root, 2, seed=1)
    assert same(model, again) and losses == losses_again and not same(model, other)
    state = torch.get_rng_state()
    mixvae.evaluate(model, make_loader(MixMNIST(root, "val", noise=0.1), 10), VAELoss(), "cpu")
    separate(model, MixMNIST(root, "test")[:][0])
    assert torch.equal(state, torch.get_rng_state())


def test_learning_rate_rises_from_the_optimizers_and_falls_to_zero(root):
    torch.manual_seed(0)
    model, rates = VAE(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    train_model(model, make_loader(MixMNIST(root), 55), VAELoss(), optimizer, 2, make_loader(MixMNIST(root, "val"), 50), "cpu")
    assert len(rates) == 20 and max(rates) == pytest.approx(3e-3) and rates.index(max(rates)) in (7, 8)
    assert rates[0] < 1e-3 and rates[-1] < 3e-4 and optimizer.param_groups[0]["lr"] == 0


def test_a_last_batch_of_one_image(root):
    torch.manual_seed(0)
    model = VAE()
    losses, _ = train_model(model, make_loader(MixMNIST(root), 61, shuffle=True), VAELoss(), torch.optim.Adam(model.parameters()),
                            1, make_loader(MixMNIST(root, "val"), 49), "cpu")
    assert len(MixMNIST(root)) % 61 == 1 and len(MixMNIST(root, "val")) % 49 == 1 and math.isfinite(losses[0])


def psnr(estimate, truth):
    return -10 * math.log10((estimate - truth).square().mean().item())


def test_blind_training_separates(tmp_path):
    write_stand_in(tmp_path, 4000, 200)
    model, _ = train(tmp_path, epochs=8)
    finish(model, MixMNIST(tmp_path, "val"))
    mixed, sources = MixMNIST(tmp_path, "test")[:]
    decoded, separated = torch.stack(model(mixed)[1:3], dim=1), separate(model, mixed)
    for source in range(2):
        trivial = psnr(mixed, sources[:, source])
        assert psnr(decoded[:, source], sources[:, source]) > trivial + 3
        assert psnr(separated[:, source], sources[:, source]) > psnr(decoded[:, source], sources[:, source])


# ---- separation ------------------------------------------------------------------------------------------------------
def test_finish_puts_the_digit_first_and_calibrates(root):
    val_set = MixMNIST(root, "val")
    supervised, _ = train(root, 3, VAELoss(supervised=True))
    mixed, sources = val_set[:]
    before = supervised.eval()(mixed)
    finish(supervised, val_set)
    assert all(torch.equal(a, b) for a, b in zip(before, supervised(mixed)))  # it was in order
    assert supervised.variance.item() == pytest.approx(F.mse_loss(before[0], sources.mean(dim=1)).item())
    val_set.images = val_set.images.flip(1)  # as if blind training had taken the garments for source 1
    finish(supervised, val_set)
    after = supervised(mixed)
    for old, new in zip((0, 2, 1, 5, 6, 3, 4), range(7)):
        assert torch.allclose(before[old], after[new], atol=1e-6)


def test_separate_accounts_for_the_whole_mixture_and_repeats_itself(root):
    model, _ = train(root)
    mixed = MixMNIST(root, "test")[:][0]
    model.train()
    sources = separate(model, mixed)
    assert sources.shape == (60, 2, 784) and 0 <= sources.min() and sources.max() <= 1 and not sources.requires_grad
    assert torch.allclose(sources.sum(dim=1), 2 * mixed, atol=1e-6) and model.training
    assert torch.equal(sources, separate(model, mixed)) and torch.allclose(sources[5:6], separate(model, mixed[5:6]), atol=1e-4)
    noisy = separate(model, mixed, noise=0.3)
    assert 0 <= noisy.min() and noisy.max() <= 1
    assert (noisy.sum(dim=1) - 2 * mixed).abs().mean() > 0.01  # a part of the residual is the noise's


# ---- command line ----------------------------------------------------------------------------------------------------
FILES = ["loss.png", "mixvae.pt", "results.png", "samples.png", "separation.png"]


def test_command_line_leaves_every_file(root, tmp_path):
    out = tmp_path / "r\u00e9sultats"
    run = subprocess.run([sys.executable, HERE / "mixvae.py", "--epochs", "2", "--device", "cpu", "--data", root, "--out", out],
                         env=os.environ | {"MPLBACKEND": "none such", "PYTHONIOENCODING": "ascii", "DISPLAY": ""},
                         cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in out.iterdir()) == FILES and run.stderr == ""
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines if re.match(r" +\d+  ", line)] == ["1", "1", "1", "1", "2"]
    assert len(re.findall(r"\d+\.\d\d \(\d+\.\d\d\)", run.stdout)) == 5 and all(name in lines[-1] for name in FILES)


def test_readme_lines_load_and_separate(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--epochs", "1", "--device", "cpu", "--data", str(root), "--noise", "0.1"])
    (tmp_path / "data").symlink_to(root)
    code, = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["digit"].shape == names["garment"].shape == (784,)


def test_supervised_and_noise_reach_the_run(root, tmp_path, capsys):
    args = ["--epochs", "1", "--device", "cpu", "--data", str(root), "--out", str(tmp_path)]
    printed = []
    for extra in ([], [], ["--supervised"], ["--noise", "0.3"], ["--seed", "1"]):
        assert main(args + extra) == 0
        printed.append(re.sub(r" +[\d.]+  best", "", capsys.readouterr().out))  # without the seconds
    assert printed[0] == printed[1] and len(set(printed)) == 4


@pytest.mark.parametrize("flags", [
    "--epochs=-3", "--epochs=0", "--epochs=1e2", "--noise=nan", "--noise=inf", "--noise=-0.1", "--batch-size=0",
    "--batch-size=1", "--lr=0", "--lr=inf", "--seed=x", "--seed=-1", "--device=banana", "--device=meta"])
def test_wrong_flags(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main([flags])
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and flags.split("=")[0] in message
    assert re.search(r"cpu" if "device" in flags else r"from \S+ to \S+", message)


def test_no_data_and_no_network(offline, tmp_path, capsys):
    assert main(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    for part in ["MNIST", str(tmp_path / "none"), "test_mixvae.py DIR"] + [name for name, _ in MNIST.resources]:
        assert part in message
    assert len(message.splitlines()) == 2 and "Traceback" not in message


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_damaged_files_heal_from_good_archives(damage, offline, tmp_path, monkeypatch):
    md5 = write_stand_in(tmp_path, 100, 20, archives=True)
    for dataset in (MNIST, FashionMNIST):
        monkeypatch.setattr(dataset, "resources", [(name, md5[dataset.__name__, name]) for name, _ in dataset.resources])
    good = MixMNIST(tmp_path)[:][0]
    victim = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    content = victim.read_bytes()
    victim.unlink() if damage == "missing" else victim.write_bytes(content[:5000] if damage == "truncated" else b"")
    assert torch.equal(MixMNIST(tmp_path)[:][0], good) and victim.read_bytes() == content
    for archive in victim.parent.glob("*.gz"):  # without good archives it says which folder to delete
        archive.write_bytes(archive.read_bytes()[:-9])
    victim.write_bytes(b"")
    with pytest.raises(OSError, match=re.escape(f"Delete {victim.parent}")):
        MixMNIST(tmp_path)


def test_out_that_is_a_file(root, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main(["--data", str(root), "--out", str(tmp_path / "out")]) == 1
    assert (tmp_path / "out").read_text() == "mine" and capsys.readouterr().out == ""  # no epoch, not even its header


def test_full_disk_leaves_the_earlier_files(root, tmp_path):
    old = {name: b"of an earlier run" for name in FILES}
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
            "import mixvae; sys.exit(mixvae.main(sys.argv[1:]))")
    run = subprocess.run([sys.executable, "-c", code, "--epochs", "1", "--device", "cpu", "--data", root, "--out", tmp_path],
                         cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 1 and re.fullmatch(r"mixvae: .*File too large.*\n", run.stderr)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def interrupt(values):
    raise KeyboardInterrupt


@pytest.mark.parametrize("fault, status, reason", [(interrupt, 130, "interrupted"),
                                                   (lambda values: [value * math.nan for value in values], 1, "finite")])
def test_ctrl_c_and_divergence_keep_the_finished_epochs(fault, status, reason, monkeypatch, root, tmp_path, capsys):
    class Faulty(VAELoss):
        batches = 0

        def forward(self, outputs, sources):
            values = super().forward(outputs, sources)
            Faulty.batches += values[0].requires_grad  # of training
            return fault(values) if Faulty.batches == last and values[0].requires_grad else values

    monkeypatch.setattr(mixvae, "VAELoss", Faulty)
    args = ["--epochs", "3", "--device", "cpu", "--batch-size", "110", "--data", str(root), "--out", str(tmp_path)]
    last = 5  # in the first epoch
    assert main(args) == status
    message = capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [] and reason in message and "nothing is saved" in message
    Faulty.batches, last = 0, 3 * 5 + 3 * 5  # in the third epoch after the three starts
    assert main(args) == status
    message = capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES and reason in message and "epoch 3" in message
    assert len(message.splitlines()) == 1
    state = torch.load(tmp_path / "mixvae.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state.values())


if __name__ == "__main__":
    write_stand_in(*sys.argv[1:2] or sys.exit("usage: python test_mixvae.py DIR"))
