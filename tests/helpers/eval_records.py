"""Records of made-up episodes."""

from __future__ import annotations

from tokenprune.evaluation.records import EpisodeRecord


def record(variant="dense", environment="goal", task=0, init_state=0, success=True, steps=40, ms=(10.0,), **more):
    return EpisodeRecord(
        **{
            "variant": variant, "environment": environment, "task": task, "init_state": init_state, "seed": 0,
            "success": success, "steps": steps, "queries": len(ms), "replans": 0, "fallbacks": 0,
            "modes": {"coarse": len(ms)}, "tokens_mean": 512.0, "tokens_last": 512.0, "gflops": 1000.0,
            "action_change": 0.1, "seam_change": None, "gripper_switches": 1, "crashes": 0, "query_ms": list(ms),
            "phases_ms": {}, "simulator_s": 1.0, "policy_s": 0.5, "episode_s": 2.0,
            **more,
        }
    )  # fmt: skip
