"""One record of a made-up episode."""

from __future__ import annotations

from tokenprune.evaluation.records import EpisodeRecord

RECORD = EpisodeRecord(
    variant="dense", environment="toy", task=1, init_state=2, seed=3, success=True, steps=9, queries=2, replans=0,
    fallbacks=1, modes={"default": 1, "dense": 1}, tokens_mean=12.5, tokens_last=8.0, gflops=0.25, action_change=0.5,
    seam_change=None, gripper_switches=4, crashes=1, query_ms=[1.5, 2.25], phases_ms={"vision": 0.5}, simulator_s=0.75,
    policy_s=0.125, episode_s=1.0,
)  # fmt: skip
