use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use crate::fixtures::{self, ramp};
use crate::parallel::task::build_pool;
use crate::tensor::dtype::Dtype;

fn options() -> Options {
    Options { percentiles: vec![5.0, 50.0, 95.0], bins: 10, entries: true }
}

fn open(path: &Path) -> Adapter {
    Adapter::open(path).expect("a sound adapter")
}

fn run(adapter: &Adapter, base: Option<&Checkpoint>, threads: usize) -> Result<Analysis> {
    let pool = build_pool(Some(threads)).expect("a pool");
    analyze(adapter, base, &options(), &pool, &Task::new())
}

fn two_layers(directory: &Path) -> PathBuf {
    fixtures::write_adapter(directory, &[("layers.0.q", 24, 16), ("layers.1.q", 24, 16)], "")
}

#[test]
fn figures_do_not_depend_on_the_number_of_threads() {
    let directory = tempfile::tempdir().expect("a directory");
    let one = open(&two_layers(&directory.path().join("one")));
    let other = fixtures::write_adapter(
        &directory.path().join("two"),
        &[("layers.1.q", 24, 16), ("layers.0.q", 24, 16), ("layers.2.q", 24, 16)],
        "",
    );
    let two = open(&other);
    // Floats print as the shortest text that reads back as the same bits.
    let text = |value: &dyn std::fmt::Debug| format!("{value:?}");
    let single = run(&one, None, 1).expect("analysed");
    assert_eq!(text(&single), text(&run(&one, None, 4).expect("analysed")));
    let compared = |threads| {
        let pool = build_pool(Some(threads)).expect("a pool");
        compare(&[&one, &two], true, &pool, &Task::new()).expect("compared")
    };
    assert_eq!(text(&compared(1)), text(&compared(4)));
}

#[test]
fn norms_are_of_the_dense_product_and_relative_to_the_base() {
    let directory = tempfile::tempdir().expect("a directory");
    let adapter = open(&two_layers(&directory.path().join("adapter")));
    let path = directory.path().join("base/model.safetensors");
    let weight = ramp(24 * 16, 9);
    let names = ["model.layers.0.q.weight", "model.layers.1.q.weight"];
    let tensors = names.map(|name| (name, Dtype::F32, &[24, 16][..], weight.clone()));
    fixtures::write(&path, &tensors);
    let base = Checkpoint::open(&path).expect("a base");
    let analysis = run(&adapter, Some(&base), 2).expect("analysed");
    let module = &adapter.modules()["layers.0.q"];
    let (a, b) = module
        .delta
        .plain()
        .map(|(a, b)| (a.read_f64().expect("read"), b.read_f64().expect("read")))
        .expect("plain");
    let entry = |i: usize, j: usize| 2.0 * (b[2 * i] * a[j] + b[2 * i + 1] * a[16 + j]);
    let entries: Vec<f64> = (0..24 * 16).map(|index| entry(index / 16, index % 16)).collect();
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let dense = norm(&mut entries.iter().copied());
    let measured = &analysis.modules[0];
    assert!((measured.spectrum.frobenius_norm / dense - 1.0).abs() < 1e-12);
    assert_eq!((measured.shape, measured.rank, measured.scaling), ([24, 16], 2, 2.0));
    let found = measured.base.as_ref().expect("a base");
    assert_eq!(found.tensor, names[0]);
    let expected = norm(&mut weight.iter().map(|&value| f64::from(value)));
    assert!((found.norm / expected - 1.0).abs() < 1e-12);
    let largest = entries.iter().fold(0.0f64, |most, value| most.max(value.abs()));
    let counted = &measured.entries.as_ref().expect("entries").statistics;
    assert!((counted.max_abs / largest - 1.0).abs() < 1e-6);
    assert_eq!(counted.count, 24 * 16);
}

#[test]
fn a_base_without_the_module_is_a_problem_by_name() {
    let directory = tempfile::tempdir().expect("a directory");
    let adapter = open(&two_layers(&directory.path().join("adapter")));
    let path = directory.path().join("base/model.safetensors");
    fixtures::write(&path, &[("layers.0.q.weight", Dtype::F32, &[24, 16], ramp(384, 1))]);
    let error = run(&adapter, Some(&Checkpoint::open(&path).expect("a base")), 1);
    assert!(error.expect_err("no weight").to_string().contains("layers.1.q"));
    fixtures::write(
        &path,
        &[
            ("layers.0.q.weight", Dtype::F32, &[24, 16], ramp(384, 1)),
            ("layers.1.q.weight", Dtype::F32, &[24, 8], ramp(192, 1)),
        ],
    );
    let error = run(&adapter, Some(&Checkpoint::open(&path).expect("a base")), 1);
    assert!(error.expect_err("another shape").to_string().contains("[24, 8]"));
}

#[test]
fn what_cannot_be_merged_is_still_measured() {
    let directory = tempfile::tempdir().expect("a directory");
    let tensor = |name, shape, count| (name, Dtype::Bf16, shape, ramp(count, count));
    fixtures::write(
        &directory.path().join("adapter_model.safetensors"),
        &[
            tensor("base_model.model.conv.lora_A.weight", &[2, 3, 3, 3][..], 54),
            tensor("base_model.model.conv.lora_B.weight", &[8, 2, 1, 1][..], 16),
            tensor("base_model.model.embed.lora_embedding_A", &[2, 30][..], 60),
            tensor("base_model.model.embed.lora_embedding_B", &[8, 2][..], 16),
            tensor("base_model.model.head.token_adapter.trainable_tokens_delta", &[1, 8][..], 8),
        ],
    );
    let config =
        r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "trainable_token_indices": [3]}"#;
    fs::write(directory.path().join("adapter_config.json"), config).expect("written");
    let analysis = run(&open(directory.path()), None, 2).expect("analysed");
    let shapes: Vec<_> = analysis.modules.iter().map(|m| (m.kind, m.shape)).collect();
    assert_eq!(shapes, [("convolution", [8, 27]), ("embedding", [8, 30])]);
    assert_eq!(analysis.tensors.len(), 5);
    assert_eq!(analysis.weights.count, 54 + 16 + 60 + 16 + 8);
    assert!(analysis.features.iter().any(|feature| feature.contains("row of embeddings")));
}

#[test]
fn a_comparison_pairs_modules_by_name_whatever_their_order_and_rank() {
    let directory = tempfile::tempdir().expect("a directory");
    let one = open(&two_layers(&directory.path().join("one")));
    let other = fixtures::write_adapter(
        &directory.path().join("two"),
        &[("layers.0.q", 24, 16), ("layers.1.q", 16, 24), ("layers.9.q", 24, 16)],
        "",
    );
    let two = open(&other);
    let pool = build_pool(Some(2)).expect("a pool");
    let compared = compare(&[&one, &two, &one], true, &pool, &Task::new()).expect("compared");
    let paths: Vec<_> = compared.modules.iter().map(|module| module.path.as_str()).collect();
    assert_eq!(paths, ["layers.0.q", "layers.1.q", "layers.9.q"]);
    // The same values in the first module: one update.
    let first = &compared.modules[0].pairs[0];
    assert!((first.cosine - 1.0).abs() < 1e-12 && first.relative_difference < 1e-12);
    assert!((first.output_phi[1][1] - 1.0).abs() < 1e-12);
    assert_eq!(first.output_expected[1][1], 2.0 / 24.0);
    assert!(first.input_angles.iter().all(|angle| angle.abs() < 1e-7));
    assert_eq!(first.sign_agreement, 1.0);
    // Other shapes under one name cannot be compared, and make the whole unknown.
    let second = &compared.modules[1].pairs;
    assert_eq!(second.iter().map(|p| (p.first, p.second)).collect::<Vec<_>>(), [(0, 2)]);
    assert!(compared.cosine[0][1].is_nan() && compared.cosine[1][0].is_nan());
    assert!((compared.cosine[0][2] - 1.0).abs() < 1e-12);
    assert!(compared.notes.iter().any(|note| note.contains("layers.1.q")));
    let third = &compared.modules[2];
    assert_eq!(third.ranks, [None, Some(2), None]);
    // Without the pairs of modules all else is the same; a clash is told of once.
    let less = compare(&[&one, &two, &one], false, &pool, &Task::new()).expect("compared");
    assert!(less.modules.iter().all(|module| module.pairs.is_empty()));
    assert_eq!(format!("{:?}", less.cosine), format!("{:?}", compared.cosine));
    assert_eq!(less.modules[1].norms, compared.modules[1].norms);
    assert_eq!((less.notes.len(), compared.notes.len()), (1, 2));
}

#[test]
fn a_cancelled_analysis_stops() {
    let directory = tempfile::tempdir().expect("a directory");
    let adapter = open(&two_layers(directory.path()));
    let pool = build_pool(Some(1)).expect("a pool");
    let task = Task::new();
    task.cancel();
    let result = analyze(&adapter, None, &options(), &pool, &task);
    assert!(matches!(result, Err(crate::Error::Cancelled)));
    let result = compare(&[&adapter, &adapter], true, &pool, &task);
    assert!(matches!(result, Err(crate::Error::Cancelled)));
}
