"""What a target may be made of in a test."""

from vllm_double.target.step_cost import StepCost

__all__ = ["FreeVerification"]


class FreeVerification(StepCost):
    """Of a target that verifies for nothing: chains are as long as there is something to verify."""

    def estimate(self) -> tuple[float, float]:
        """A step, and each further token."""
        return 1.0, 0.0
