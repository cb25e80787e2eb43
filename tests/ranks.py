"""Run cv4ctrl in fresh processes, several times in one set of ranks, so that a launch is paid once.

A job is a command line for cv4ctrl.main, or (name of a function of this file, its arguments)."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(world, *jobs, timeout=400, threads=None):
    """Run the jobs one after the other on `world` ranks -> [(exit code, value)] as rank 0 has them; threads a rank, of two cores."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    alone = {name: value for name, value in os.environ.items() if name not in (*common, "RANK", "LOCAL_RANK")}
    ranks = []
    for rank in range(world):
        env = {"OMP_NUM_THREADS": str(threads or max(1, 2 // world))} | alone
        env |= common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}  # one starts as `python cv4ctrl.py` does
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        ranks.append(subprocess.Popen([sys.executable, __file__, json.dumps(jobs, default=str)], env=env, **output))
    try:
        texts = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    results = [line for line in texts[0].splitlines() if line.startswith("RESULTS ")]
    assert results, "\n".join(texts)
    results = json.loads(results[0].removeprefix("RESULTS "))
    assert all(code == 0 for code, _ in results) or any(code == 2 for code, _ in results), "\n".join(texts)
    return results


def rows(folder):
    """Rows of training in metrics.jsonl."""
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def logged(folder):
    """Lines of metrics.jsonl so far."""
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def weights(folder):
    """Tensors of the safetensors files of a folder, by name."""
    from safetensors.torch import load_file

    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a, b, tolerance=None):
    """Bitwise, or to within a tolerance relative to the largest weight of each tensor."""
    import torch

    assert a and a.keys() == b.keys()
    return all(torch.equal(a[n], b[n]) if tolerance is None else (a[n] - b[n]).abs().max() <= tolerance * b[n].abs().max() for n in a)


# --- jobs -----------------------------------------------------------------------------------------------------------------------


def gradients(argv, file):
    """Gradients of one global batch, as the real engine accumulates and reduces them over the ranks -> safetensors `file`."""
    import deepspeed
    from safetensors.torch import save_file

    import cv4ctrl

    c = cv4ctrl.resolve(cv4ctrl.parse(argv), cv4ctrl.WORLD)
    device, base = cv4ctrl.start_ranks(), Path(c.pretrained_model_name_or_path)
    encoded = cv4ctrl.encode(c, base, cv4ctrl.open_dataset(c), device)
    model = cv4ctrl.load_transformer(base / "transformer", None, cv4ctrl.torch.float32, device)
    cv4ctrl.recompute(model, cv4ctrl.recomputed(c, len(model.transformer_blocks)))
    frame = cv4ctrl.prepare(model, c.resolution, device, cv4ctrl.torch.float32)
    settings = cv4ctrl.engine_settings(c)
    settings["zero_optimization"]["offload_optimizer"]["device"] = "none"
    engine = cv4ctrl.start_engine(c, settings, model)
    stream = cv4ctrl.Stream(c, encoded, cv4ctrl.RANK, cv4ctrl.WORLD)
    for turn, batch in enumerate(cv4ctrl.micro_batches(stream, 0, 1, device)):
        engine.backward(cv4ctrl.batch_loss(engine, frame, batch, c.weighting_scheme))
        if turn + 1 < c.gradient_accumulation_steps:
            engine.step()
    found = {name: deepspeed.utils.safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
    if cv4ctrl.RANK == 0:
        save_file({name: gradient.clone().contiguous() for name, gradient in found.items()}, file)


def count_encoders(argv):
    """Run a command line -> [calls of the VAE's encoder, calls of the text encoder] that it made."""
    from diffusers import AutoencoderKL
    from transformers import GlmModel

    import cv4ctrl

    calls, kept = [0, 0], (AutoencoderKL.encode, GlmModel.forward)

    def counted(place, function):
        def call(*args, **kwargs):
            calls[place] += 1
            return function(*args, **kwargs)

        return call

    AutoencoderKL.encode, GlmModel.forward = counted(0, kept[0]), counted(1, kept[1])
    try:
        cv4ctrl.main(argv)
    finally:
        AutoencoderKL.encode, GlmModel.forward = kept
    return calls


def die_while_encoding(argv, after):
    """Run a command line and be killed in the VAE's call number `after`."""
    import signal

    from diffusers import AutoencoderKL

    import cv4ctrl

    calls, encode = [], AutoencoderKL.encode

    def encode_or_die(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(*args, **kwargs)

    AutoencoderKL.encode, cv4ctrl.SHARD_ENTRIES = encode_or_die, 8
    cv4ctrl.main(argv)


def stop_after_saving(argv, step):
    """Run a command line and stop once the checkpoint of `step` is there."""
    import cv4ctrl

    save = cv4ctrl.save_checkpoint

    def save_and_stop(engine, config, now, *more):
        save(engine, config, now, *more)
        if now == step:
            raise StopIteration

    cv4ctrl.save_checkpoint = save_and_stop
    try:
        cv4ctrl.main(argv)
    except StopIteration:
        pass
    finally:
        cv4ctrl.save_checkpoint = save


def cost_of_a_step(argv):
    """[seconds a step of the trainer, seconds of a bare forward + backward + AdamW on one batch], one after the other, medians.

    Bare: the installed model with its own attention, nothing of ours but the batch."""
    import statistics

    import torch
    from diffusers import CogView4Transformer2DModel

    import cv4ctrl

    c = cv4ctrl.resolve(cv4ctrl.parse(argv), 1)
    device, base = cv4ctrl.start_ranks(), Path(c.pretrained_model_name_or_path)
    encoded = cv4ctrl.encode(c, base, cv4ctrl.open_dataset(c), device)
    model = cv4ctrl.load_transformer(base / "transformer", None, torch.float32, device)
    assert isinstance(model, CogView4Transformer2DModel)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = next(cv4ctrl.micro_batches(cv4ctrl.Stream(c, encoded, 0, 1), 0, 1, device))
    size = torch.full((len(batch["latent"]), 2), float(c.resolution))
    inputs = torch.cat([batch["latent"], batch["control"]], 1), batch["prompt_embeds"].float(), batch["timestep"], size, size, 0 * size
    trained, bare, write = [], [], cv4ctrl.Log.write

    def write_and_do_a_bare_step(log, kind, step, values):
        write(log, kind, step, values)
        if kind != "train":
            return
        trained.append(c.total_batch_size / values["samples_per_s"])
        clock = time.perf_counter()
        torch.nn.functional.mse_loss(model(*inputs, return_dict=False)[0], batch["noise"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        bare.append(time.perf_counter() - clock)

    cv4ctrl.Log.write = write_and_do_a_bare_step
    try:
        cv4ctrl.main(argv)
    finally:
        cv4ctrl.Log.write = write
    return [statistics.median(times[5:]) for times in (trained, bare)]


def peak_of_a_step(argv):
    """[bytes of tensors at the peak of a run's step, the plan's figure for it], by PyTorch's profiler of memory."""
    import torch

    import cv4ctrl

    c = cv4ctrl.resolve(cv4ctrl.parse(argv), 1)
    seen, step, start = {}, cv4ctrl.train_step, cv4ctrl.start_engine

    def watched_start(config, settings, model):
        seen["profile"] = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        seen["before"] = sum(p.nbytes for p in model.parameters())
        seen["settings"] = settings
        seen["profile"].__enter__()
        return start(config, settings, model)

    def watched_step(*args):
        result = step(*args)
        seen["profile"].__exit__(None, None, None)
        return result

    cv4ctrl.train_step, cv4ctrl.start_engine = watched_step, watched_start
    try:
        cv4ctrl.main(argv)
    finally:
        cv4ctrl.train_step, cv4ctrl.start_engine = step, start
    now = peak = seen["before"]
    for event in seen["profile"].profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    base = Path(c.pretrained_model_name_or_path)
    shape = cv4ctrl.shape_of(base / "transformer", c.only_target_transformer_blocks)
    tokens = max(cv4ctrl.token_counts(c, base, cv4ctrl.open_dataset(c)))
    load = cv4ctrl.Load(c, seen["settings"]["zero_optimization"], shape, cv4ctrl.Cards(1, "CPU", None, None), tokens)
    return [peak, load.total()]


def main(jobs):
    sys.path.insert(0, str(ROOT))
    import cv4ctrl

    leave, results = cv4ctrl.dist.destroy_process_group, []
    cv4ctrl.dist.destroy_process_group = lambda: None  # the next job goes on with the same ranks
    for job in jobs:
        code = value = None
        try:
            if isinstance(job[1], list):
                value = globals()[job[0]](*job[1])
            else:
                cv4ctrl.main(job)
            code = 0
        except SystemExit as ended:
            code = ended.code
        results.append((code, value))
    if cv4ctrl.RANK == 0:
        print("\nRESULTS " + json.dumps(results), flush=True)
    if cv4ctrl.dist.is_initialized():
        leave()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
