use std::path::Path;

use crate::checkpoint::names::renames::Renames;
use crate::error::Error;
use crate::fixtures::{Tensor, open, plain, ramp, write, write_adapter};
use crate::plan::{Plan, Slice};
use crate::tensor::dtype::Dtype;

const JOINED: &str = r#"[{
    "sources": ["\\.q\\.(weight|bias)", "\\.k\\.(weight|bias)", "\\.v\\.(weight|bias)"],
    "targets": [".qkv.\\1"],
    "operations": [{"name": "Concatenate", "dimension": 0}]
}]"#;

fn base(root: &Path, weights: &[(&str, &[u64])], config: &str) {
    let tensors: Vec<Tensor<'_>> = (weights.iter())
        .map(|(name, shape)| (*name, Dtype::F32, *shape, ramp(shape.iter().product(), 3)))
        .collect();
    write(&root.join("base/model.safetensors"), &tensors);
    std::fs::write(root.join("base/config.json"), config).expect("written");
}

/// The parts of a plan that are not whole tensors, by the tensors' names.
fn parts(
    root: &Path,
    modules: &[(&str, u64, u64)],
    rules: Option<&str>,
) -> Result<Vec<(String, Slice)>, String> {
    let adapter = write_adapter(&root.join("adapter"), modules, "");
    let mut options = plain();
    options.renames = rules.map(|rules| Renames::from_json(rules).expect("sound"));
    match Plan::new(&open(&root.join("base"), &[adapter]), options) {
        Ok(plan) => Ok((plan.tensors())
            .flat_map(|(_, tensor)| {
                tensor.updates().iter().map(|update| (tensor.name.clone(), update.slice.clone()))
            })
            .collect()),
        Err(Error::Plan(problems)) => Err(problems.join("\n")),
        Err(other) => panic!("{other}"),
    }
}

fn rows(start: u64, end: u64) -> Slice {
    Slice { rows: Some(start..end), ..Slice::default() }
}

fn outputs(start: u64, end: u64) -> Slice {
    Slice { outputs: Some(start..end), ..Slice::default() }
}

#[test]
fn modules_of_several_sizes_are_bands_where_all_are_known() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    base(root, &[("l.0.qkv.weight", &[10, 6]), ("l.0.o.weight", &[6, 6])], "{}");
    let all = [("l.0.q", 5, 6), ("l.0.k", 2, 6), ("l.0.v", 3, 6), ("l.0.o", 6, 6)];
    let found = parts(root, &all, Some(JOINED)).expect("fits");
    let qkv = || "l.0.qkv.weight".to_owned();
    let expected = [
        (qkv(), rows(0, 5)),
        (qkv(), rows(5, 7)),
        (qkv(), rows(7, 10)),
        ("l.0.o.weight".to_owned(), Slice::default()),
    ];
    assert_eq!(found, expected);
    let problem = parts(root, &all[..2], Some(JOINED)).expect_err("v is missing");
    assert!(problem.contains("nothing tells the sizes of the others"), "{problem}");
    let problem = parts(root, &[("l.0.q", 5, 7)], Some(JOINED)).expect_err("too wide");
    assert!(problem.contains("nothing tells the sizes"), "{problem}");
    // Without rules the names fit nothing.
    let problem = parts(root, &all, None).expect_err("no rules");
    assert!(problem.contains("l.0.q fits no tensor of the base"), "{problem}");
}

#[test]
fn a_joined_module_is_cut_where_its_parts_are_stored() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let stored: &[(&str, &[u64])] =
        &[("l.0.q.weight", &[5, 6]), ("l.0.k.weight", &[2, 6]), ("l.0.v.weight", &[3, 6])];
    base(root, stored, "{}");
    let found = parts(root, &[("l.0.qkv", 10, 6)], Some(JOINED)).expect("fits");
    let expected = [("q", outputs(0, 5)), ("k", outputs(5, 7)), ("v", outputs(7, 10))];
    assert_eq!(found, expected.map(|(name, part)| (format!("l.0.{name}.weight"), part)));
    let problem = parts(root, &[("l.0.qkv", 9, 6)], Some(JOINED)).expect_err("too short");
    assert!(problem.contains("it has shape [10, 6]"), "{problem}");
    base(root, &stored[..2], "{}");
    let problem = parts(root, &[("l.0.qkv", 10, 6)], Some(JOINED)).expect_err("v is missing");
    assert!(problem.contains("do not fit together"), "{problem}");
}

const MIXTRAL: &str = r#"{"model_type": "mixtral"}"#;

#[test]
fn an_expert_is_a_band_of_the_stacked_ones() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let stacked: &[(&str, &[u64])] =
        &[("h.0.mlp.experts.gate_up_proj", &[3, 8, 6]), ("h.0.mlp.experts.down_proj", &[3, 6, 4])];
    base(root, stacked, MIXTRAL);
    let at = "model.h.0.block_sparse_moe.experts";
    let modules =
        [(format!("{at}.2.w3"), 4, 6), (format!("{at}.1.w2"), 6, 4), (format!("{at}.0.w1"), 4, 6)];
    let modules =
        modules.each_ref().map(|(name, outputs, inputs)| (name.as_str(), *outputs, *inputs));
    let found = parts(root, &modules, None).expect("fits");
    let name = |index: usize| stacked[index].0.to_owned();
    assert_eq!(found, [(name(0), rows(20, 24)), (name(0), rows(0, 4)), (name(1), rows(6, 12))]);
    let beyond = format!("{at}.3.w1");
    let problem = parts(root, &[(&beyond, 4, 6)], None).expect_err("there are three");
    assert!(problem.contains("has shape [3, 8, 6] in the base"), "{problem}");
    let narrow = format!("{at}.0.w1");
    let problem = parts(root, &[(&narrow, 4, 5)], None).expect_err("too narrow");
    assert!(problem.contains("it has shape [4, 6]"), "{problem}");
}

#[test]
fn what_is_stored_twice_is_not_chosen_from() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let old = "model.h.0.block_sparse_moe.experts.0";
    let names = [format!("{old}.w1.weight"), format!("{old}.w3.weight")];
    let stacked = "model.h.0.mlp.experts.gate_up_proj";
    base(root, &[(&names[0], &[4, 6]), (&names[1], &[4, 6]), (stacked, &[1, 8, 6])], MIXTRAL);
    // By its own name an expert has but one tensor.
    let own = format!("{old}.w1");
    let found = parts(root, &[(&own, 4, 6)], None).expect("fits");
    assert_eq!(found, [(names[0].clone(), Slice::default())]);
    let gates = ["model.h.0.block_sparse_moe.gate.weight", "model.h.0.mlp.gate.weight"];
    base(root, &[(gates[0], &[4, 6]), (gates[1], &[4, 6]), ("model.norm.weight", &[6])], MIXTRAL);
    let found = parts(root, &[("model.h.0.mlp.gate", 4, 6)], None).expect("fits");
    assert_eq!(found, [(gates[1].to_owned(), Slice::default())]);
    // No name as it stands, and two that it may have been.
    let rules = r#"[{"sources": ["old", "older"], "targets": ["new"]}]"#;
    base(root, &[("l.old.weight", &[4, 6]), ("l.older.weight", &[4, 6])], "{}");
    let problem = parts(root, &[("l.new", 4, 6)], Some(rules)).expect_err("two ways");
    assert!(problem.contains("nothing tells which"), "{problem}");
}

#[test]
fn what_cannot_be_followed_is_said_by_name() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    base(root, &[("l.0.w13.weight", &[8, 6])], "{}");
    let rules = r#"[{"sources": ["w13"], "targets": ["gate", "up"],
        "operations": [{"name": "Interleave", "dimension": 0}, {"name": "Chunk", "dimension": 0}]}]"#;
    let problem = parts(root, &[("l.0.up", 4, 6)], Some(rules)).expect_err("interleaved");
    assert!(problem.contains("l.0.up.weight cannot be followed to the base"), "{problem}");
    assert!(problem.contains("Interleave and Chunk"), "{problem}");
}

#[test]
fn the_bias_of_a_product_goes_with_its_rows() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let stored: &[(&str, &[u64])] = &[("l.0.qkv.weight", &[10, 6]), ("l.0.qkv.bias", &[10])];
    base(root, stored, "{}");
    let tensors: Vec<(String, Vec<u64>)> = [("q", 5), ("k", 2), ("v", 3)]
        .into_iter()
        .flat_map(|(name, outputs)| {
            let key = |leaf: &str| format!("base_model.model.l.0.{name}.lora_{leaf}");
            [
                (key("A.weight"), vec![2, 6]),
                (key("B.weight"), vec![outputs, 2]),
                (key("B.bias"), vec![outputs]),
            ]
        })
        .collect();
    let adapter = root.join("adapter");
    let tensors: Vec<Tensor<'_>> = (tensors.iter())
        .map(|(name, shape)| {
            (name.as_str(), Dtype::F32, &shape[..], ramp(shape.iter().product(), 5))
        })
        .collect();
    write(&adapter.join("adapter_model.safetensors"), &tensors);
    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_bias": true}"#;
    std::fs::write(adapter.join("adapter_config.json"), config).expect("written");
    let mut options = plain();
    options.renames = Some(Renames::from_json(JOINED).expect("sound"));
    let plan = Plan::new(&open(&root.join("base"), &[adapter]), options).expect("fits");
    let bias = plan.tensors().find(|(_, tensor)| tensor.name == "l.0.qkv.bias").expect("there").1;
    let row_ranges: Vec<_> = bias.updates().iter().map(|update| update.slice.clone()).collect();
    assert_eq!(row_ranges, [rows(0, 5), rows(5, 7), rows(7, 10)]);
}
