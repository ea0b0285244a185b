"""From the flags of a command to an engine that is ready to start.

It does not know what the engine will be used for.
Read first: this imports torch; commands import it inside their functions.
"""

import torch

from greenroom.cli.engine_flags import EngineFlags
from greenroom.cli.places import cache_folder
from runtime.engine.engine import Engine
from runtime.engine.follower import open_held
from runtime.engine.step_model import load_step_model
from runtime.kernels.device_choice import device_of
from runtime.kernels.graph_capture import step_capture
from runtime.model.generation import check_base
from runtime.model.repertoire import Repertoire
from runtime.model.signature import TrustPolicy
from runtime.model.stored_base import open_base


def open_repertoire(flags: EngineFlags) -> Repertoire:
    """The repertoire, with the keys that are trusted.

    Raises:
        InvalidInputError: the keys cannot be read.
    """
    return Repertoire(flags.repertoire, trust=TrustPolicy.load(flags.trust) if flags.trust else None)


def build_engine(flags: EngineFlags, *, number: int | None = None) -> Engine:
    """Open a generation of the repertoire, the current one by default, load its base, and make an engine.

    Raises:
        RepertoireError, UnknownBaseError, InvalidInputError, UnsupportedDeviceError: what they name.
    """
    device = device_of(flags.device)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    repertoire = open_repertoire(flags)
    generation, let_go = open_held(repertoire, number)
    generation.densities.read_ahead()
    named = flags.base or generation.manifest.base.name
    base = open_base(named, cache=cache_folder())
    check_base(generation.manifest, base.info)
    return Engine(
        load_step_model(
            base,
            device=device,
            max_context=flags.limits.max_context,
            weights=flags.dtype,
            step=flags.step,
            folder=cache_folder() / "native",
            threads=torch.get_num_threads(),
            kernels=repertoire.export_folder(generation.manifest.generation, "triton"),
        ),
        base.tokenizer,
        base.eos_token_ids,
        repertoire=repertoire,
        generation=generation,
        options=flags.limits,
        retire=let_go,
        capture=step_capture(device, flags.cuda_graphs),
    )
