"""The small model that proposes blocks, and what others know of it."""

from dpace.drafter.drafter import Drafter, load_drafter
