"""An optimiser without a schedule, as the package schedulefree has them, for tests without it."""

import torch


class ScheduleFreeSGD(torch.optim.Optimizer):
    """SGD of arXiv 2405.15682: it trains y between z and their mean x, and x is to be used."""

    def __init__(self, params, lr=1.0, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    def train(self):
        self._show("y", True)

    def eval(self):
        self._show("x", False)

    @torch.no_grad()
    def _show(self, name, train_mode):
        for group in self.param_groups:
            group["train_mode"] = train_mode
            for p in group["params"]:
                if self.state[p]:
                    p.copy_(self.state[p][name])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                raise Exception("Optimizer was not in train mode when step is called")
            group["k"] += 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update({name: p.clone() for name in "xyz"})
                state["z"].sub_(p.grad, alpha=group["lr"])
                state["x"].lerp_(state["z"], 1 / group["k"])
                state["y"].copy_(state["z"].lerp(state["x"], group["beta"]))
                p.copy_(state["y"])


class WantsClosure(torch.optim.SGD):
    """One whose step has a closure with a default, and yet can't do without it, as SAM."""

    def step(self, closure=None):
        return closure()
