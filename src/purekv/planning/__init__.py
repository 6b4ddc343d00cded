"""Calibrated plans: what each choice costs a model, and the choices that cost the least."""

from purekv.planning.plan import Plan, model_fingerprint, shipped_plans

__all__ = ["Plan", "model_fingerprint", "shipped_plans"]
