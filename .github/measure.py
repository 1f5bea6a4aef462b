"""Print the README's figures that a plain run of mixvae.py does not print itself, on the real data in data/.

    python .github/measure.py recipe     the assignment's own recipe, 20 epochs
    python .github/measure.py seeds      the defaults for 5 epochs with the seeds 0 to 19
    python .github/measure.py speed      training's share of the machine's matrix-product speed, beside a smaller network
"""
import contextlib, io, itertools, re, sys, time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mixvae
from mixvae import VAE, Decoder, Encoder, MixMNIST, VAELoss, make_loader


def network(encoder_widths, decoder_widths):
    model = VAE()
    model.encoder = Encoder(encoder_widths, decoder_widths[0])
    model.decoder1, model.decoder2 = Decoder(decoder_widths), Decoder(decoder_widths)
    return model


def recipe():
    torch.manual_seed(0)
    model = network((784, 512, 256, 128, 64), (32, 64, 128, 256, 512, 784))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    train_data = make_loader(MixMNIST(), 32)
    for _ in range(20):
        for mixed, sources in train_data:
            outputs = model.train()(mixed)
            bce = F.binary_cross_entropy(outputs[0], mixed, reduction="sum") / len(mixed)
            optimizer.zero_grad()
            (bce + VAELoss()(outputs, sources)[2]).backward()
            optimizer.step()
    mixvae.finish(model, MixMNIST(split="val"))
    mixvae.print_psnr(model, MixMNIST(split="test"))


def seeds():
    decoded, separated = [], []
    for seed in range(20):
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())) as output:
            assert mixvae.main(["--epochs", "5", "--seed", str(seed), "--out", "results/seeds"]) == 0
            output.seek(0)
            rows = {line.split()[0]: [float(value) for value in re.findall(r"(\d+\.\d+) \(", line)]
                    for line in output.read().splitlines() if line.startswith(("decoded", "separated"))}
        decoded.append(rows["decoded"])
        separated.append(rows["separated"])
        print(f"seed {seed:2}: decoded {rows['decoded'][:2]}, separated {rows['separated']}", flush=True)
    for name, values in (("decoded", decoded), ("separated", separated)):
        for source, column in zip(("digit", "garment"), zip(*values)):
            ordered = sorted(column)
            print(f"{name} {source}: minimum {ordered[0]}, median {sum(ordered[9:11]) / 2:.2f}, maximum {ordered[-1]}")


def speed(rounds=6):
    def product_speed():
        """fp32 matrix products of the network's own sizes, forward and backward, in GFLOP/s."""
        flops = seconds = 0
        for n_in, n_out in ((784, 1024), (1024, 512), (256, 512), (256, 512), (512, 784), (512, 784)):
            x, w, g = torch.randn(256, n_in), torch.randn(n_out, n_in), torch.randn(256, n_out)
            for product in (lambda: x @ w.t(), lambda: g @ w, lambda: g.t() @ x):
                product()
                start = time.perf_counter()
                for _ in range(40):
                    product()
                seconds += time.perf_counter() - start
                flops += 40 * 2 * 256 * n_in * n_out
        return flops / seconds / 1e9

    train_set = MixMNIST()
    setups = {"default": (VAE(), "medium", 8e-3), "default, all products in fp32": (VAE(), "highest", 8e-3),
              "a smaller network (784-512-256), fp32": (network((784, 512, 256), (32, 256, 512, 784)), "highest", 4e-3)}
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=lr, fused=True) for name, (model, _, lr) in setups.items()}
    times, products = {name: [] for name in setups}, []
    for _ in range(rounds):
        torch.set_float32_matmul_precision("highest")
        products.append(product_speed())
        for name, (model, precision, _) in setups.items():
            torch.set_float32_matmul_precision(precision)
            model.train()
            start = time.perf_counter()
            for mixed, sources in make_loader(train_set, 256, shuffle=True):
                loss = VAELoss()(model(mixed), sources)[0]
                optimizers[name].zero_grad()
                loss.backward()
                optimizers[name].step()
            times[name].append(time.perf_counter() - start)
    product = sorted(products)[rounds // 2]
    print(f"fp32 matrix products: median {product:.0f} GFLOP/s, best {max(products):.0f}")
    for name, (model, *_) in setups.items():
        parameters, median = sum(p.numel() for p in model.parameters()), sorted(times[name])[rounds // 2]
        rate = 6 * parameters * len(train_set) / median / 1e9
        print(f"{name}: {parameters:,} parameters, {median:.2f} s an epoch (median of {rounds}), {rate:.0f} GFLOP/s, "
              f"{rate / product:.0%} of the fp32 products")


if __name__ == "__main__":
    {"recipe": recipe, "seeds": seeds, "speed": speed}[sys.argv[1]]()
