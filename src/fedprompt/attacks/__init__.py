"""What hostile clients do, for experiments with defences."""

from fedprompt.attacks.base import Attack, AttackOptions, attackers_of, attacks

__all__ = ["Attack", "AttackOptions", "attackers_of", "attacks"]
