"""What a drafter keeps of one sequence: its prompt, its draft tree, and the order that it works on."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvbuffers.slot_allocator import SlotAllocator
from pipeinfer.core.messages import Advance, Prompt, accepted_name
from pipeinfer.core.ports import SampledToken, Sampling
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import UNLIMITED
from speculation.trees.tree import Node, Tree


@dataclass(slots=True, eq=False)
class DraftSequence:
    """``passes``: that may still be evaluated; ``cutoff``, ``draft_batch``: of the last order. ``served``: the last
    pass with rows of it; ``passed_over``: passes over leaves since then that had none of those that it offered."""

    id: int
    sampling: Sampling
    draft_batch: int
    prompt: list[int] = field(default_factory=list)
    prefilled: int = 0
    tree: Tree | None = None  # made when the prompt is complete
    origin: Node | None = None  # its first root, the prompt's last token
    last_position: int = 0  # from it on nodes are of no use to the request, or beyond the model
    names: int = 0  # given so far
    ahead: set[Node] = field(default_factory=set)  # evaluated guesses below the root
    passes: int = 0
    is_ordered: bool = False
    cutoff: float = 0.0
    faulty_passes: int = 0  # in a row
    is_mute: bool = False  # sends nothing more
    served: int = 0
    passed_over: int = 0
    withheld: list[tuple[Node, list[SampledToken]]] = field(default_factory=list)
    """Choices below the cutoff: a later order may want them."""

    def take_prompt(self, message: Prompt, policy: Policy, positions: int) -> None:
        """The next part of the prompt; at its end the draft tree begins. ``positions``: see Drafter."""
        self.prompt += message.tokens
        if not message.is_last:
            return
        position = len(self.prompt) - 1
        self.tree = Tree(self.prompt[-1], position, policy.most_nodes(), self.id)
        self.tree.take(self.tree.root)
        self.tree.root.name = accepted_name(position)
        self.origin = self.tree.root
        self.last_position = min(message.last_position, positions)
        self.passes = UNLIMITED if policy.schedule == "continuous" else 0
        # Without a guess that could be of use, or with positions that it was not made for, it reads nothing.
        self.is_mute = len(self.prompt) > min(positions, message.last_position)

    def advance(self, tree: Tree, message: Advance, allocator: SlotAllocator) -> None:
        """Move the root of ``tree`` along the accepted tokens; slots of what died become free."""
        for position, token in enumerate(message.tokens, message.position):
            heir, died = tree.advance(token)
            if heir.name is None:
                heir.name = accepted_name(position)
            self.ahead.discard(heir)
            self.ahead.difference_update(died)
            allocator.release(self.id, *[node.slot for node in died if node.slot is not None])
            if heir.slot is not None:
                allocator.commit(self.id, heir.slot)

    def restart(self, allocator: SlotAllocator, is_under_evaluation: bool) -> None:
        """Forget every guess. The root is evaluated again if it has been, unless a pass with it is under way."""
        if self.tree is None:
            return
        allocator.release(self.id, *[node.slot for node in self.tree.prune() if node.slot is not None])
        self.ahead.clear()
        self.withheld = []
        if not is_under_evaluation:
            self.tree.renew()

    def silence(self, allocator: SlotAllocator) -> None:
        """There is no slot for its tokens: it sends nothing more, and its slots are for others."""
        self.is_mute = True
        allocator.free(self.id)
        self.ahead.clear()
        self.withheld = []
        if self.tree is not None:
            self.tree.prune()
            self.tree.root.slot = None
