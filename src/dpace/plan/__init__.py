"""Plan by formula what a training takes, before a weight is loaded, and write it in lines."""

from dpace.plan.lines import answer_lines, plan_lines, training_lines
from dpace.plan.training import TrainingPlan, expected_lengths, known_lengths, plan_recipe
