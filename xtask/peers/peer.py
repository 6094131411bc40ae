"""One cell on one peer, sampled on demand: python peer.py --case DIR --engine ENGINE --threads N

DIR holds the cell as `roofbench sample --case DIR` wrote it: config.json, case.json (class, call, seed), inputs and our
outputs. The model is filled with the same synthetic weights (synthetic.py). The first line printed tells that the
peer is ready, its versions, and how far its outputs lie from ours: max |difference| / max |peer's| per output. Then
each line `N` on standard input runs N calls and answers with one JSON line of nanoseconds; the end of the input
stops the process.

Engines: torch-eager, torch-compile, onnxruntime, openvino.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import synthetic

DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def torch_model(case, config, dtype):
    """The model as loaded from a saved checkpoint of synthetic weights: saving first keeps to the names that
    checkpoints use, where the library's own module names differ from them."""
    import torch
    import transformers
    from safetensors.torch import load_file as load_tensors, save_file
    from transformers.initialization import no_init_weights

    kind = getattr(torch, DTYPES[dtype])
    cls = getattr(transformers, case["class"])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        parsed = cls.config_class.from_pretrained(folder, local_files_only=True)
        with no_init_weights():
            fresh = cls(parsed).to(kind)
        fresh.tie_weights()
        fresh.save_pretrained(folder, max_shard_size="1000GB")
        del fresh
        path = Path(folder) / "model.safetensors"
        state = load_tensors(path)
        for name, value in state.items():
            if value.is_floating_point():
                state[name] = torch.from_numpy(synthetic.tensor(name, value.shape, case["seed"])).to(kind)
        save_file(state, path, metadata={"format": "pt"})
        del state
        return cls.from_pretrained(folder, dtype=kind).eval()


def prepare(case, config, arrays, engine, dtype, threads):
    """(a function that runs the cell once, another that gives its result as {name: array}, versions)"""
    import torch

    torch.set_num_threads(threads)
    model = torch_model(case, config, dtype)
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    arguments = dict(case["arguments"])
    if isinstance(arguments.get("vocoder"), str):
        # the published one is what the class makes by default
        arguments["vocoder"] = torch_model({**case, "class": "SpeechT5HifiGan"}, {"model_type": "hifigan"}, dtype)
    versions = {"torch": torch.__version__}
    if engine.startswith("torch"):
        import transformers

        versions["transformers"] = transformers.__version__
        if engine == "torch-compile":
            model.forward = torch.compile(model.forward)

        def run():
            with torch.inference_mode():
                method = model if case["call"] == "forward" else getattr(model, case["call"])
                result = method(**tensors, **arguments)
            return {"sequences": result} if isinstance(result, torch.Tensor) else dict(result)

        return run, lambda out: {k: v.float().numpy() for k, v in out.items() if isinstance(v, torch.Tensor)}, versions
    if case["call"] != "forward":
        raise SystemExit(f"{engine} does not run cells that generate")

    class Positional(torch.nn.Module):
        """Exporters want positional arguments and one tensor back."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *args):
            return self.model(**dict(zip(tensors, args)), return_dict=False)[0]

    with torch.inference_mode():
        field = next(iter(model(**tensors).keys()))
    if engine == "onnxruntime":
        import onnxruntime

        versions["onnxruntime"] = onnxruntime.__version__
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = str(Path(folder) / "model.onnx")
            torch.onnx.export(Positional(), tuple(tensors.values()), path, input_names=list(tensors), dynamo=True,
                              external_data=True, verbose=False)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        wanted = {i.name for i in session.get_inputs()}
        feed = {name: value for name, value in arrays.items() if name in wanted}
        return lambda: session.run(None, feed)[0], lambda out: {field: out}, versions
    import openvino

    versions["openvino"] = openvino.__version__
    with torch.no_grad():
        converted = openvino.convert_model(Positional(), example_input=tuple(tensors.values()))
    for port, value in zip(converted.inputs, arrays.values()):
        port.get_node().set_partial_shape(openvino.PartialShape(list(value.shape)))
    converted.validate_nodes_and_infer_types()
    compiled = openvino.compile_model(converted, "CPU", {
        "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": dtype, "PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()
    values = list(arrays.values())
    return lambda: request.infer(values)[0], lambda out: {field: np.array(out)}, versions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True, type=Path)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", default="f32", choices=DTYPES)
    options = parser.parse_args()
    case = json.loads((options.case / "case.json").read_text())
    config = json.loads((options.case / "config.json").read_text())
    arrays = load_file(options.case / "inputs.safetensors")
    run, arrays_of, versions = prepare(case, config, arrays, options.engine, options.dtype, options.threads)
    ours = load_file(options.case / "outputs.safetensors")
    theirs = arrays_of(run())
    errors = {name: float(np.abs(theirs[name] - ours[name]).max() / max(np.abs(theirs[name]).max(), 1e-30))
              for name in theirs if name in ours and theirs[name].shape == ours[name].shape}
    run()
    print(json.dumps({"ready": options.engine, "versions": versions, "errors": errors}), flush=True)
    for line in sys.stdin:
        samples = []
        for _ in range(int(line)):
            begin = time.perf_counter_ns()
            run()
            samples.append(time.perf_counter_ns() - begin)
        print(json.dumps({"samples_ns": samples}), flush=True)


if __name__ == "__main__":
    main()
