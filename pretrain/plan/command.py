"""`--plan`: from a command line to the lines that are printed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from datasets.errors import UserError
from datasets.tokens import Tokenizer
from pretrain.build import build_tokenizer
from pretrain.cli import Command
from pretrain.curriculum import Curriculum
from pretrain.data import open_data
from pretrain.distributed import Ranks
from pretrain.plan.inputs import Input, of_data, without_data
from pretrain.plan.leg import Paperwork
from pretrain.plan.paper import pretended
from pretrain.plan.tokens import Sizes
from pretrain.plan.told import told
from pretrain.plan.wanted import NOWHERE, Wanted
from pretrain.rundir import RunDir
from pretrain.zoo.models import DualConfig, own_tokenizer


def plan(command: Command) -> list[str]:
    """What a run would take, in lines to print. Nothing is trained, and no run directory made.

    Raises:
        UserError: it cannot be planned; names the flag.
    """
    run, wanted = command.run, command.plan
    assert wanted is not None
    if run.spread.offload:
        raise UserError("--plan knows the memory of GPUs and not that of hosts: leave --offload out")
    if wanted.pairs:
        tokenizer = own_tokenizer(run.model) or _sizes(command)
        length = min(wanted.caption_tokens or tokenizer.context_length, tokenizer.context_length)
        how = "as stated" if wanted.caption_tokens else "as long as the model reads"
        inputs: list[Input] = without_data(run, pairs=wanted.pairs, length=length, told=how)
    else:
        tokenizer, inputs = _from_data(command, wanted)
    work = Paperwork(run=run, wanted=wanted, tokenizer=tokenizer, inputs=inputs)
    curriculum = Curriculum(run.stages)
    stretches = curriculum.of_stage(command.stage) if command.stage is not None else curriculum.stretches
    with pretended(wanted.gpus):  # what torch finds out about shards once serves all trials
        legs = [work.leg(each) for each in stretches]
    return told(run, wanted, inputs, legs)


def _sizes(command: Command) -> Tokenizer:
    model = command.run.model
    assert isinstance(model, DualConfig)
    return Sizes(command.run.vocabulary, model.text.context_length)


def _from_data(command: Command, wanted: Wanted) -> tuple[Tokenizer, list[Input]]:
    run = command.run
    if any(each.data == NOWHERE for each in run.sources.values()):
        raise UserError(
            "this recipe names no data: --data 'shards/*.tar', or --pairs 1.5e9 to plan without any"
        )
    ranks = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
    data = open_data(run)
    try:
        with tempfile.TemporaryDirectory() as folder:
            own = RunDir(command.out)
            place = own if own.tokenizer.exists() else RunDir(Path(folder))
            tokenizer = build_tokenizer(run, data.feeds, place, ranks)
        return tokenizer, of_data(data.feeds, tokenizer, length=wanted.caption_tokens)
    finally:
        data.close()
