use std::fs;

use super::formats::peft::{PICKLED_WEIGHTS, WEIGHTS};
use super::*;
use crate::error::Error;
use crate::fixtures::{Tensor, ramp, write, write_adapter};
use crate::tensor::dtype::Dtype;

/// An adapter of rank 2 with those tensors, zeros all, and those config fields.
fn adapter(root: &Path, tensors: &[(&str, &[u64])], fields: &str) -> Result<Adapter> {
    let tensors: Vec<Tensor<'_>> = tensors
        .iter()
        .map(|(name, shape)| (*name, Dtype::F32, *shape, ramp(shape.iter().product(), 1)))
        .collect();
    write_adapter(root, &[], fields);
    write(&root.join("adapter_model.safetensors"), &tensors);
    Adapter::open(root)
}

fn complaint(root: &Path, tensors: &[(&str, &[u64])], fields: &str) -> String {
    adapter(root, tensors, fields).expect_err("a broken adapter").to_string()
}

#[test]
fn every_key_has_its_place() {
    let directory = tempfile::tempdir().expect("a directory");
    let tensors: &[(&str, &[u64])] = &[
        ("base_model.model.a.q.lora_A.weight", &[2, 6]),
        ("base_model.model.a.q.lora_B.weight", &[4, 2]),
        ("base_model.model.a.q.lora_B.bias", &[4]),
        ("a.k.lora_A.default.weight", &[2, 6]),
        ("a.k.lora_B.default.weight", &[4, 2]),
        ("a.k.lora_B.default.bias", &[4]),
        ("base_model.model.wte.lora_embedding_A", &[2, 9]),
        ("base_model.model.wte.lora_embedding_B", &[6, 2]),
        ("base_model.model.conv.lora_A.weight", &[2, 3, 5, 5]),
        ("base_model.model.conv.lora_B.weight", &[4, 2, 1, 1]),
        ("base_model.model.conv.lora_B.bias", &[4]),
        ("base_model.model.a.q.base_layer.bias", &[4]),
        ("base_model.model.score.modules_to_save.weight", &[3, 6]),
        ("base_model.model.score.original_module.weight", &[3, 6]),
        ("base_model.model.wte.token_adapter.trainable_tokens_delta", &[2, 6]),
        ("base_model.model.wte.token_adapter.base_layer.weight", &[9, 6]),
    ];
    let fields = r#", "lora_bias": true, "trainable_token_indices": [4, 0]"#;
    let adapter = adapter(directory.path(), tensors, fields).expect("sound");
    let kinds: Vec<_> =
        adapter.modules().values().map(|module| (module.path.as_str(), module.kind)).collect();
    assert_eq!(
        kinds,
        [
            ("a.q", LayerKind::Linear),
            ("a.k", LayerKind::Linear),
            ("wte", LayerKind::Embedding),
            ("conv", LayerKind::Convolution),
        ]
    );
    assert!(adapter.modules()["a.q"].bias.is_some() && adapter.modules()["wte"].bias.is_none());
    let saved: Vec<_> = adapter.saved().iter().map(|saved| saved.path.as_str()).collect();
    assert_eq!(saved, ["a.q.bias", "score.weight", "wte.weight"]);
    let roles: Vec<_> = adapter.others().iter().map(|(_, role)| *role).collect();
    assert_eq!(roles, [Role::TrainingOnly]);
    let [rows] = adapter.trained_rows() else { panic!("one tensor of rows") };
    assert_eq!((rows.path.as_str(), rows.rows.as_slice()), ("wte", &[4, 0][..]));
    let coverage = adapter.coverage(&[]).expect("listed");
    let usages: Vec<_> = coverage.tensors.iter().map(|tensor| tensor.usage).collect();
    assert_eq!(usages.iter().filter(|usage| **usage == Usage::Used).count(), 15);
    assert_eq!(usages[13], Usage::NotNeeded);
}

#[test]
fn factors_that_do_not_belong_together_are_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    assert!(complaint(root, &[], "").contains("holds no tensors"));
    let a: (&str, &[u64]) = ("x.lora_A.weight", &[2, 6]);
    assert!(complaint(root, &[a], "").contains("x.lora_A.weight but not its lora_B"));
    let b = |shape: &'static [u64]| ("x.lora_B.weight", shape);
    assert!(complaint(root, &[b(&[4, 2])], "").contains("not its lora_A"));
    assert!(
        complaint(root, &[a, b(&[4, 3])], "").contains("rank 2 but x.lora_B.weight has rank 3")
    );
    assert!(complaint(root, &[a, b(&[4, 2, 1])], "").contains("no pair of factors"));
    let pattern = r#", "rank_pattern": {"x": 3}"#;
    assert!(complaint(root, &[a, b(&[4, 2])], pattern).contains("gives this module rank 3"));
    let magnitude = ("x.lora_magnitude_vector", &[4u64][..]);
    assert!(complaint(root, &[a, b(&[4, 2]), magnitude], "").contains("does not set use_dora"));
    let dora = r#", "use_dora": true"#;
    assert!(complaint(root, &[a, b(&[4, 2])], dora).contains("no magnitude for x"));
    let long = ("x.lora_magnitude_vector", &[5u64][..]);
    assert!(complaint(root, &[a, b(&[4, 2]), long], dora).contains("has 4 outputs"));
    let bias = ("x.lora_B.bias", &[4u64][..]);
    assert!(complaint(root, &[a, b(&[4, 2]), bias], "").contains("does not set lora_bias"));
    let biased = r#", "lora_bias": true"#;
    assert!(complaint(root, &[a, b(&[4, 2])], biased).contains("no bias of lora_B for x"));
    // What the config explains is no damage.
    let grouped = r#", "use_qalora": true"#;
    assert!(complaint(root, &[a, b(&[4, 3])], grouped).contains("is a QALoRA"));
    let experts = r#", "target_parameters": ["x.weights"]"#;
    assert!(adapter(root, &[("x.lora_A.weight", &[6, 5]), b(&[4, 6])], experts).is_ok());
    let uneven = [("x.lora_A.weight", &[5u64, 5][..]), b(&[4, 5])];
    assert!(complaint(root, &uneven, experts).contains("rank 5"));
    let blocks = r#", "use_bdlora": {"target_modules_bd_b": ["x"], "nblocks": 2}"#;
    assert!(adapter(root, &[a, b(&[4, 1])], blocks).is_ok());
    assert!(complaint(root, &[a, b(&[4, 2])], blocks).contains("has rank 2"));
    assert!(complaint(root, &[a, b(&[5, 1])], blocks).contains("cut into the config's blocks"));
    // As wide as their rank, and of half as many columns: the config tells, not the shapes.
    let square = [("x.lora_A.weight", &[2u64, 2][..]), b(&[2, 1])];
    assert!(adapter(root, &square, blocks).is_ok());
    assert!(complaint(root, &square, "").contains("transposes of factors of rank 2"));
    let kasa = r#", "kasa_config": {}"#;
    assert!(complaint(root, &[a, b(&[4, 2])], kasa).contains("no lora_diag for x"));
    let diagonal = |shape: &'static [u64]| ("x.lora_diag", shape);
    assert!(adapter(root, &[a, b(&[4, 2]), diagonal(&[2])], kasa).is_ok());
    assert!(complaint(root, &[a, b(&[4, 2]), diagonal(&[3])], kasa).contains("has rank 2"));
    assert!(complaint(root, &[a, b(&[4, 2]), diagonal(&[2])], "").contains("no kasa_config"));
    let rows: (&str, &[u64]) = ("x.token_adapter.trainable_tokens_delta", &[3, 6]);
    let tokens = r#", "trainable_token_indices": {"y": [1, 2, 7]}"#;
    assert!(complaint(root, &[rows], tokens).contains("which rows they are"));
    let tokens = r#", "trainable_token_indices": [1, 2]"#;
    assert!(complaint(root, &[rows], tokens).contains("names 2 tokens"));
}

#[test]
fn a_parameter_saved_twice_counts_once() {
    let directory = tempfile::tempdir().expect("a directory");
    let twice: &[(&str, &[u64])] =
        &[("x.bias", &[4]), ("x.modules_to_save.bias", &[4]), ("x.original_module.bias", &[4])];
    let adapter = adapter(directory.path(), twice, "").expect("sound");
    assert_eq!(adapter.saved().len(), 1);
    let roles: Vec<_> = adapter.others().iter().map(|(_, role)| *role).collect();
    assert_eq!(roles, [Role::Repeated, Role::TrainingOnly]);
    assert!(adapter.obstacles(&[]).is_empty());
    let unlike: &[(&str, &[u64])] = &[("x.bias", &[4]), ("x.modules_to_save.bias", &[5])];
    assert!(complaint(directory.path(), unlike, "").contains("differ, but both are"));
}

#[test]
fn what_is_missing_is_said() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let open = || Adapter::open(root).expect_err("no adapter").to_string();
    assert!(open().contains("is an empty directory"));
    fs::write(root.join("config.json"), "{}").expect("written");
    assert!(open().contains("is a directory without weights, with 1 entry (config.json)"));
    fs::write(root.join("model.safetensors"), "").expect("written");
    assert!(open().contains("is a whole model, not an adapter"));
    write_adapter(&root.join("inner"), &[("x", 4, 6)], "");
    assert!(open().contains("give that folder, inner"));
    fs::remove_file(root.join("model.safetensors")).expect("removed");
    write_adapter(root, &[("x", 4, 6)], "");
    assert!(Adapter::open(root).is_ok());
    fs::remove_file(root.join(WEIGHTS)).expect("removed");
    assert!(open().contains("no adapter_model.safetensors"));
    fs::write(root.join(PICKLED_WEIGHTS), "").expect("written");
    assert!(open().contains("needs torch"));
    assert!(matches!(Adapter::open(&root.join("absent")), Err(Error::Io { .. })));
}
