"""Train a drafter for a real LLM on this machine and show what it gains."""

from pathlib import Path

from dpace.flags import command, parse
from dpace.ledger import claim, hold


def run(args: list[str]) -> None:
    """Run `dpace demo`."""
    from dpace.demo.recipe import DemoConfig, demo_recipe

    config = parse(DemoConfig, "demo", args)

    from dpace.demo.run import run_demo, summary
    from dpace.locate import find_target
    from dpace.report.tables import console, results_table, slots_table

    output = Path(demo_recipe(config).output)
    with hold(output):
        claim(output, "results.json", "acceptance.png", "weights.png")
        results = run_demo(config)
    console(config.wide).print(results_table(results, config.wide), slots_table(results, config.wide))
    for line in summary(results):
        print(line)
    print(f"\nwritten: {output}/results.json, acceptance.png, weights.png, and the drafter in {output}/dpace")
    prompt = f"{config.prompts or 'demo'}#{results.rows[0].responses[0].id}"
    print(
        "next:",
        command("generate", target=find_target(results.target), drafter=output / "dpace", prompt=prompt),
    )
