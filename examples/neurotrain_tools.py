"""A script for NeuroTrain's LoRA tools; only the import has changed.

python examples/neurotrain_tools.py BASE ADAPTER ADAPTER [ADAPTER …] [--output DIR]
"""

import argparse

# from tools.analyzers import LoRAAnalyzer, UnifiedAnalyzer, analyze_lora_weights
from lorafast.analyzers import LoRAAnalyzer, UnifiedAnalyzer, analyze_lora_weights


def main() -> None:
    """Analyse, compare and merge, in the three ways that the tools offer."""
    parser = argparse.ArgumentParser(description="Analyse, compare and merge LoRA adapters.")
    parser.add_argument("base")
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--output", default="runs/lora_analysis")
    arguments = parser.parse_args()
    first, *_ = arguments.adapters

    # The analyzer itself.
    analyzer = LoRAAnalyzer(output_dir=arguments.output, device="auto")
    results = analyzer.analyze_lora_weights(first)
    statistics = results["weight_statistics"]
    print(f"parameters: {statistics['total_parameters']:,}")
    print(f"mean {statistics['mean']:.6f}, std {statistics['std']:.6f}")
    print(f"95th percentile: {statistics['percentiles']['95th']:.6f}")
    for layer in list(results["layer_analysis"])[:3]:
        print("layer:", layer)
    analyzer.generate_report(results)

    comparison = analyzer.compare_adapters(arguments.adapters)
    for name, analysis in comparison["comparison_data"].items():
        print(f"{name}: {analysis['weight_statistics']['total_parameters']:,} parameters")

    merged = analyzer.merge_adapters(
        base_model=arguments.base,
        adapters=arguments.adapters,
        output_name="weighted_model",
        merge_strategy="weighted",
        weights=[1.0 / (position + 1) for position in range(len(arguments.adapters))],
    )
    print(f"merged: {merged['output_path']}, {merged['model_size_mb']:.1f} MB")

    # One object for everything.
    unified = UnifiedAnalyzer(output_dir=f"{arguments.output}/unified")
    unified.merge_lora_adapters(
        arguments.base, arguments.adapters, "average_model", merge_strategy="average"
    )
    unified.compare_lora_adapters(arguments.adapters, save_plots=False)

    # A function for each task.
    analyze_lora_weights(first, output_dir=f"{arguments.output}/quick")


if __name__ == "__main__":
    main()
