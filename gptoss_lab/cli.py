"""gptoss-lab: what the package does, from a shell."""
import argparse
import datetime
import sys

DIM, PLAIN = "\033[2m", "\033[0m"


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 where something was wrong, 130 where it was interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        sys.stderr.close()
        return 0
    except (ValueError, KeyError, OSError, MemoryError, ImportError, RuntimeError) as error:
        print(f"gptoss-lab: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("gptoss-lab", description="Look inside gpt-oss models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, text):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def device(sub):
        sub.add_argument("--device", help="cpu, cuda, ... (default: the first GPU, else cpu)")

    source = dict(help='a checkpoint folder, a hub name such as openai/gpt-oss-20b, or "tiny", which comes with this')
    sub = command("inspect", _inspect, "print parts, parameters and bytes, without loading weights")
    sub.add_argument("source", help=source["help"] + '; "gpt-oss-20b" and "gpt-oss-120b" need no files')
    sub = command("plan", _plan, "print where every byte goes, and the largest context that fits")
    sub.add_argument("source", help=source["help"] + '; "gpt-oss-20b" and "gpt-oss-120b" need no files')
    sub.add_argument("--context", type=int, metavar="N", help="positions (default: all that the model has)")
    sub.add_argument("--memory", metavar="SIZE", help="such as 16GiB (default: what is free there now)")
    sub.add_argument("--record", nargs="+", default=(), metavar="NAMES", help="hook points to record all the while")
    sub.add_argument("--chunk", type=int, metavar="N", help="prompt tokens to read at a time")
    sub.add_argument("--device", default="cuda", help="(default: %(default)s, whether there is one or not)")
    sub.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="(default: the checkpoint's)")
    sub = command("verify", _verify, "check a checkpoint's files against its config and the published ones")
    sub.add_argument("folder")
    sub.add_argument("--sha256", action="store_true", help="also read every byte and compare checksums")
    device(sub)
    command("hooks", _hooks, "list every hook point")
    sub = command("synth", _synth, "write a checkpoint of published shapes with random contents, to measure with")
    sub.add_argument("folder", help="gone on with if it was begun")
    sub.add_argument("--like", choices=("gpt-oss-20b", "gpt-oss-120b", "tiny"), default="gpt-oss-20b")
    sub.add_argument("--layers", type=int, metavar="N", help="only so many layers")
    sub.add_argument("--seed", type=int, default=0, metavar="N")
    for name, run, text in (
        ("generate", _generate, "continue a text"),
        ("chat", _chat, "talk in the Harmony format; Ctrl-C stops an answer, Ctrl-D ends"),
    ):
        sub = command(name, run, text)
        sub.add_argument("source", **source)
        if name == "generate":
            sub.add_argument("prompt")
        sub.add_argument("--max-new-tokens", type=int, default=None if name == "generate" else 4096, metavar="N")
        sub.add_argument("--temperature", type=float, metavar="T", default=0.0 if name == "generate" else None,
                         help="0 takes the likeliest token; default: 0, in chat 1 (the tiny model: 0)")  # fmt: skip
        sub.add_argument("--top-k", type=int, metavar="K")
        sub.add_argument("--top-p", type=float, metavar="P")
        sub.add_argument("--seed", type=int)
        device(sub)
        if name == "chat":
            sub.add_argument("--effort", choices=("low", "medium", "high"), default="medium", help="reasoning effort")
            sub.add_argument("--instructions", metavar="TEXT", help="what a developer message should say")
    from .tiny.train import VARIANTS, Recipe

    text = "train the tiny model: a quarter of an hour; the same command goes on after an interruption"
    sub = command("train-tiny", _train_tiny, text)
    sub.add_argument("folder", help="where the run's state goes, and the model, as FOLDER/model")
    sub.add_argument("--seed", type=int, default=Recipe.seed, metavar="N", help="(default: %(default)s)")
    sub.add_argument("--steps", type=int, default=Recipe.steps, metavar="N", help="(default: %(default)s)")
    sub.add_argument("--variant", choices=VARIANTS, default=Recipe.variant,
                     help="; ".join(f"{name}: {what}" for name, what in VARIANTS.items()))  # fmt: skip
    sub.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default: %(default)s)")
    sub.add_argument("--verify", action="store_true", help="measure the result too, and compare it with the card")
    return parser


def _train_tiny(options):
    from .tiny import card
    from .tiny.train import Recipe, train

    if options.verify and options.variant != Recipe.variant:
        raise ValueError(f"--verify compares the standard model with its card, not the variant {options.variant}")
    recipe = Recipe(options.seed, options.variant, options.steps)
    try:
        folder = train(options.folder, recipe, threads=options.threads)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise
    print(f"the model is in {folder}: gptoss_lab.load({str(folder)!r})")
    if options.verify:
        comparison = card.compare(folder)
        print(comparison)
        return 0 if comparison.ok else 1


def _inspect(options):
    from .inspect import inspect

    print(inspect(options.source))


def _plan(options):
    import torch

    from .plan import plan

    chosen = plan(options.source, context=options.context, memory=options.memory, record=options.record,
                  chunk=options.chunk, device=options.device, dtype=options.dtype and getattr(torch, options.dtype))
    print(chosen)
    return 0 if chosen.fits else 1


def _verify(options):
    from .verify import verify

    report = verify(options.folder, hashes=options.sha256, device=_device(options))
    print(report)
    return 0 if report.ok else 1


def _hooks(options):
    from .hooks import HookPoints

    print(HookPoints(1))


def _synth(options):
    from .config import TINY, published
    from .synth import synthesise

    config = TINY if options.like == "tiny" else published(options.like)
    n = config.n_layers if options.layers is None else options.layers
    if not 1 <= n <= config.n_layers:
        raise ValueError(f"--layers {n}: {options.like} has 1 to {config.n_layers}")
    config = config.with_(n_layers=n, layer_types=config.layer_types[:n])
    folder = synthesise(config, options.folder, options.seed)
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {options.like} with {n} layers and random contents, {n_bytes:,} bytes")


def _device(options) -> str:
    import torch

    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _load(options):
    from .checkpoint import load

    return load(options.source, device=_device(options))


def _settings(options) -> dict:
    return {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}


def _encoding(model):
    if model.tokenizer is None:
        raise ValueError("this checkpoint brings no tokenizer, so it cannot read text")
    return model.tokenizer


def _generate(options):
    from .generate import stream

    model = _load(options)
    encoding = _encoding(model)
    print(options.prompt, end="", flush=True)
    text = _Utf8(encoding)
    for (token,) in stream(model, options.prompt, **_settings(options)):
        print(text.add(token), end="", flush=True)
    print(text.end())


class _Utf8:
    """Token ids -> text, where a character may be spread over several tokens."""

    def __init__(self, encoding):
        import codecs

        self.encoding, self.decoder = encoding, codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self.decoder.decode(self.encoding.decode_single_token_bytes(token))

    def end(self) -> str:
        return self.decoder.decode(b"", final=True)


def _chat(options):
    from .harmony import DeveloperContent, Message, SystemContent
    from .tiny import data

    model = _load(options)
    encoding = _encoding(model)
    system = SystemContent(reasoning_effort=options.effort, current_date=datetime.date.today().isoformat())
    talk, tiny = [Message("system", system)], encoding.name == "tiny"
    if tiny:  # it knows a shorter system message, and one question at a time
        talk = [data.system(options.effort)]
        print("ask the tiny model:  add 7+5+8+6   map Tom Sue, Sue Bob, Bob Kim, Kim Tom. 2 Tom   times 37*48")
    if options.temperature is None:
        options.temperature = 0.0 if tiny else 1.0
    if options.instructions:
        talk.append(Message("developer", DeveloperContent(instructions=options.instructions)))
    while True:
        try:
            line = input("\nyou: ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip():
            asked = [*talk, Message("user", line)]
            answer = _answer(model, encoding, asked, _settings(options))
            talk = asked + answer if answer and not tiny else talk


def _answer(model, encoding, talk, settings) -> list:
    """Print the model's answer while it comes. Returns its messages; none where it was stopped or went astray."""
    from . import harmony
    from .generate import stream

    prompt = harmony.render(talk, encoding, drop_analysis="all")
    settings |= {"max_new_tokens": min(settings["max_new_tokens"], model.config.n_ctx - len(prompt) + 1)}
    if settings["max_new_tokens"] < 1:
        print(f"the conversation has {len(prompt)} tokens, the context {model.config.n_ctx}: start a new one")
        return []
    parser, ends = harmony.Parser(encoding, role="assistant"), harmony.stop_tokens(encoding)
    colour = DIM if sys.stdout.isatty() else ""
    shown = None
    try:
        for (token,) in stream(model, [prompt], **settings, stop={*ends, *model.config.stop_tokens}):
            if token in model.config.stop_tokens and token not in ends:  # <|endoftext|> ends it outside Harmony
                break
            delta = parser.feed(token)
            if parser.role and parser.channel and shown != (len(parser.messages), parser.channel):
                shown = len(parser.messages), parser.channel
                to = f" to {parser.recipient}" if parser.recipient else ""
                print(f"{PLAIN if colour else ''}\n[{parser.channel}{to}] "
                      f"{colour if parser.channel != 'final' else ''}", end="")  # fmt: skip
            print(delta, end="", flush=True)
        print(parser.finish() + (PLAIN if colour else ""))
    except KeyboardInterrupt:
        print(f"{PLAIN if colour else ''}\n(stopped; the question is forgotten)")
        return []
    except harmony.HarmonyError as error:
        print(f"{PLAIN if colour else ''}\n(the answer is not Harmony, {error}; the question is forgotten)")
        return []
    if parser.messages and parser.messages[-1].recipient:
        print(f"(it calls {parser.messages[-1].recipient}; no tool is attached here)")
    return parser.messages
