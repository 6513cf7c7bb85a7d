"""For `bench/gpu.py`: Hugging Face's model of the same numbers, and OpenAI's published kernels where there are any."""
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench import gpu_checks, whole
from bench.gpu_models import first_layers, model_of, random_state
from bench.gpu_run import Row, Run, of
from bench.timing import ratios
from gptoss_lab import GptOss, generate, mxfp4
from gptoss_lab.config import to_hf
from gptoss_lab.layouts import pieces


def hugging_face(model: GptOss) -> nn.Module:
    """Hugging Face's model with the same numbers, dense: it is given unpacked experts, three times the memory."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(**to_hf(model.config))
    with torch.device("meta"):
        hf = GptOssForCausalLM(config)
    ours, state = model.state_dict(), {}
    for piece in pieces(model.config, "hf-dense"):
        if piece.ours in ours:
            state[piece.name] = piece.of(ours[piece.ours]).contiguous()
            continue
        path = piece.ours.removesuffix("weight")
        blocks, scales = ours[f"{path}blocks"], ours[f"{path}scales"]
        state[piece.name] = blocks.new_empty(piece.shape, dtype=model.dtype)
        for expert in range(len(blocks)):  # one at a time: unpacking takes four times what it makes
            state[piece.name][expert] = mxfp4.unpack(blocks[expert], scales[expert], model.dtype).T
    hf.load_state_dict(state, assign=True)
    # Its tables are no part of the state, and are numbers only where they are made.
    with torch.device(model.device):
        hf.model.rotary_emb = type(hf.model.rotary_emb)(config)
    return hf.eval().requires_grad_(False)


def published_kernels(moe) -> Callable[[Tensor], Tensor]:
    """A layer's mixture by `matmul_ogs`, as gpt-oss's own repository and vLLM call it.   [n d] -> [n d], bfloat16

    Written from these callers; it has run on no GPU yet.

    Raises:
        ImportError: no such package here. The one that PyPI calls triton_kernels is another.
    """
    try:
        import triton_kernels.matmul_ogs  # noqa: F401
    except ImportError:
        import vllm.third_party.triton_kernels as vendored  # imports itself by its short name

        sys.modules["triton_kernels"] = vendored
    from triton_kernels.matmul_ogs import FlexCtx, FnSpecs, FusedActivation, PrecisionConfig, matmul_ogs
    from triton_kernels.numerics import InFlexData
    from triton_kernels.routing import routing
    from triton_kernels.swiglu import swiglu_fn
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details import layout

    def weights(experts):
        how, settings = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        values = wrap_torch_tensor(experts.blocks.flatten(2).mT, dtype=FP4)
        scales = convert_layout(wrap_torch_tensor(experts.scales.mT), layout.StridedLayout)
        precision = PrecisionConfig(weight_scale=scales, flex_ctx=FlexCtx(rhs_data=InFlexData()))
        return convert_layout(values, how, **settings), experts.bias.float(), precision

    c, (w1, b1, p1), (w2, b2, p2) = moe.config, weights(moe.gate_up), weights(moe.down)
    activation = FusedActivation(FnSpecs("swiglu", swiglu_fn, ("alpha", "limit")), (c.swiglu_alpha, c.swiglu_limit), 2)

    def mixture(x: Tensor) -> Tensor:
        rows, gather, scatter = routing(moe.router(x), c.experts_per_token)
        h = matmul_ogs(x, w1, b1, rows, gather_indx=gather, precision_config=p1, fused_activation=activation)
        return matmul_ogs(h, w2, b2, rows, scatter_indx=scatter, precision_config=p2, gammas=rows.gate_scal)

    return mixture


def read_a_token(hf: nn.Module) -> int:
    """Bytes of weights that one token needs where only the chosen experts are read."""
    c = hf.config
    shares = {".experts.": c.num_experts_per_tok / c.num_local_experts, "embed_tokens": 1 / c.vocab_size}
    share = lambda name: next((share for part, share in shares.items() if part in name), 1)
    return round(sum(x.nbytes * share(name) for name, x in hf.state_dict().items()))


def rows(run: Run) -> Iterator[Row]:
    """Hugging Face's generate on the same numbers, dense; OpenAI's kernels on one layer's mixture."""
    yield from beside_hugging_face(run)
    yield from beside_published_kernels(run)


def beside_hugging_face(run: Run) -> Iterator[Row]:
    model, label = run.model, "Hugging Face"
    dense = 4 * sum(x.nbytes for x in model.state_dict().values())  # packed numbers take 3.8 times as much then
    if run.device.type == "cuda" and torch.cuda.mem_get_info()[0] < dense:
        run.release()
        config = first_layers(run.config, 4)
        model, label = model_of(config, random_state(config, run.device, run.dtype)), "Hugging Face, four layers"
    try:
        hf = hugging_face(model)
    except ImportError:
        yield Row(label, note="not measured: transformers is not installed")
        return
    tokens = run.text(run.sizes.short).to(run.device)
    both = model(tokens, logits_to_keep=1), hf(tokens, logits_to_keep=1).logits
    error = gpu_checks.off(*both, share=0.5)
    yield Row(f"{label}: the last row of logits against ours", error, note="both are rounded in every layer")
    if not error < 0.3:  # random routers tie more often than trained ones
        yield Row(label, note="not measured: its logits are others")
        return
    n, settings = run.sizes.timed, dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs = lambda new: hf.generate(tokens, max_new_tokens=new, attention_mask=torch.ones_like(tokens), **settings)
    ours = lambda new: generate(model, tokens, new, stop=())
    calls = {(who, new): lambda call=call, new=new: run.timed(lambda: call(new))[0]
             for who, call in (("ours", ours), ("theirs", theirs)) for new in (1, n + 1)}  # fmt: skip
    run.in_turn(calls, 1)
    taken = run.in_turn(calls, run.sizes.rounds)
    first = {who: taken[who, 1] for who in ("ours", "theirs")}
    step = {who: [(b - a) / n for a, b in zip(first[who], taken[who, n + 1])] for who in first}
    how = f"{hf.config._attn_implementation} attention, {hf.config._experts_implementation} experts, as it comes"
    name = f"{label}: prompt of {tokens.numel():,}"
    yield of(f"{name}, theirs over ours", ratios(first["theirs"], first["ours"]), "x", note=how)
    rate = {who: f"{1 / statistics.median(seconds):,.0f} tokens/s" for who, seconds in step.items()}
    read = {"ours": whole.read_a_token(model), "theirs": read_a_token(hf)}
    note = "; ".join(f"{who} {rate[who]}, {read[who]:,} bytes of weights a token" for who in rate)
    note += "; the making of our graph is in it"
    yield of(f"{name}, then a token, theirs over ours", ratios(step["theirs"], step["ours"]), "x", note=note)


def beside_published_kernels(run: Run) -> Iterator[Row]:
    moe, name = run.model.blocks[0].mlp, "OpenAI's matmul_ogs, mixture of one layer"
    try:
        theirs = published_kernels(moe)
    except ImportError as error:
        yield Row(name, note=f"not measured: there is none here ({error})")
        return
    for n in (1, 2048):
        x = torch.randn(1, n, run.config.d_model, device=run.device, dtype=run.dtype)
        ways = {"ours": lambda x=x: moe(x), "theirs": lambda x=x: theirs(x[0])[None]}
        error = gpu_checks.off(ways["theirs"](), ways["ours"](), share=0.5)
        yield Row(f"{name}, {n} tokens, against ours", error)
        if error < 0.05:
            many = {who: lambda way=way: run.timed(lambda: [way() for _ in range(20)])[1] for who, way in ways.items()}
            run.in_turn(many, 1)
            taken = run.in_turn(many, run.sizes.windows)
            note = f"ours {statistics.median(taken['ours']) / 20 * 1e6:,.0f} us, the same bytes; neither in a graph"
            yield of(f"{name}, {n} tokens, theirs over ours", ratios(taken["theirs"], taken["ours"]), "x", note=note)
