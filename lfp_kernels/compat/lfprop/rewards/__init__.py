"""Rewards and losses by name, and the reward classes (:mod:`.reward_functions`)."""

from .rewards import LOSS_MAP, REWARD_MAP, get_reward

__all__ = ["LOSS_MAP", "REWARD_MAP", "get_reward"]
