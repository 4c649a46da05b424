"""vLLM, in the trainer's process or as servers: which of the two, and what is checked before."""

from __future__ import annotations

import logging
from pathlib import Path

from accelerate import PartialState

from dro_rl.config import DROConfig
from dro_rl.engines.protocol import RolloutEngine, TrainedSelector
from dro_rl.engines.vllm_common import check_installed
from dro_rl.engines.vllm_server import ServerEngine, check_servers

logger = logging.getLogger(__name__)


class VLLMEngine:
    """What `rollout_engine: vllm` names: `ColocatedEngine` or `ServerEngine`, by `vllm_mode`."""

    @classmethod
    def check(cls, config: DROConfig) -> None:
        """vLLM is installed, or its servers answer and are as rollouts need them."""
        if config.vllm_mode == "colocate":
            check_installed("rollout_engine", config.rollout_engine)
        elif PartialState().is_main_process:
            check_servers(config)

    @classmethod
    def start(cls, config: DROConfig, selector: TrainedSelector) -> RolloutEngine:
        tokenizer, ends = selector.prompter.tokenizer, selector.prompter.ends.stops
        accelerator = selector.accelerator
        if config.vllm_mode == "colocate":
            from dro_rl.engines.vllm_colocate import ColocatedEngine

            logger.info("rollouts: vLLM in this process; starting it takes a minute")
            return ColocatedEngine(selector.module, accelerator, tokenizer, config, ends)
        from dro_rl.engines.vllm_weights import publisher

        cls.check(config)
        accelerator.wait_for_everyone()
        folder = Path(config.vllm_weights_dir or selector.run_dir / "vllm_weights")
        publish = publisher(config, folder, selector.save, selector.module, tokenizer, accelerator)
        logger.info(f"rollouts: vLLM at {', '.join(config.vllm_servers)}")
        return ServerEngine(config, ends, publish)
