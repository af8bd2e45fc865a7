use std::path::Path;

use super::*;
use crate::fixtures::{open, plain, ramp, write, write_adapter};
use crate::tensor::dtype::Dtype;

/// A base of one file with weights of those names and shapes.
fn base(root: &Path, weights: &[(&str, [u64; 2])], config: &str) {
    let tensors: Vec<_> = weights
        .iter()
        .map(|(name, shape)| (*name, Dtype::F32, &shape[..], ramp(shape[0] * shape[1], 3)))
        .collect();
    write(&root.join("base/model.safetensors"), &tensors);
    if !config.is_empty() {
        std::fs::write(root.join("base/config.json"), config).expect("written");
    }
}

fn plan(root: &Path, modules: &[(&str, u64, u64)], fields: &str) -> Result<Plan> {
    let adapter = write_adapter(&root.join("adapter"), modules, fields);
    Plan::new(&open(&root.join("base"), &[adapter]), plain())
}

/// Which tensors are merged, and whether transposed.
fn merged(plan: &Plan) -> Vec<(String, bool)> {
    plan.tensors()
        .filter_map(|(_, tensor)| match &tensor.action {
            Action::Merge(updates) => Some((tensor.source.name.clone(), updates[0].transposed)),
            _ => None,
        })
        .collect()
}

fn problems(result: Result<Plan>) -> Vec<String> {
    match result.expect_err("a plan that does not work") {
        Error::Plan(problems) => problems,
        other => panic!("{other}"),
    }
}

#[test]
fn names_fit_with_a_prefix_on_either_side() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    base(root, &[("h.0.q.weight", [4, 6]), ("h.1.q.weight", [4, 6]), ("x.weight", [4, 6])], "");
    let whole = plan(root, &[("h.0.q", 4, 6), ("h.1.q", 4, 6)], "").expect("fits");
    assert_eq!(whole.count(PlannedChange::Merge), 2);
    assert_eq!(whole.count(PlannedChange::Copy), 1);
    assert!(whole.notes.is_empty());
    let inner = plan(root, &[("model.h.0.q", 4, 6), ("model.h.1.q", 4, 6)], "").expect("fits");
    assert_eq!(merged(&inner), merged(&whole));
    assert!(inner.notes[0].contains(r#"its names begin with "model.""#));

    let names = [("model.h.0.q.weight", [4, 6]), ("model.h.1.q.weight", [4, 6])];
    base(root, &names, "");
    let outer = plan(root, &[("h.0.q", 4, 6), ("h.1.q", 4, 6)], "").expect("fits");
    assert_eq!(outer.count(PlannedChange::Merge), 2);
    assert!(outer.notes[0].contains(r#"the base's names begin with "model.""#));
}

#[test]
fn a_module_never_moves_to_another_layer() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    base(root, &[("layers.5.q.weight", [4, 6])], "");
    let complaints = problems(plan(root, &[("q", 4, 6)], ""));
    assert!(complaints[0].contains("module q fits no tensor of the base"), "{complaints:?}");
    assert!(complaints[0].contains("layers.5.q.weight"));
    assert!(!problems(plan(root, &[("layers.4.q", 4, 6)], "")).is_empty());
}

#[test]
fn two_ways_to_fit_are_an_error() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    base(root, &[("encoder.h.0.q.weight", [4, 6]), ("decoder.h.0.q.weight", [4, 6])], "");
    let complaints = problems(plan(root, &[("h.0.q", 4, 6)], ""));
    assert!(complaints[0].contains("fit the base in 2 ways"), "{complaints:?}");
}

#[test]
fn every_misfit_is_listed_at_once() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    base(root, &[("a.weight", [4, 6]), ("b.weight", [4, 6])], "");
    let complaints = problems(plan(root, &[("a", 5, 6), ("b", 4, 7)], ""));
    assert_eq!(complaints.len(), 2);
    assert!(complaints[0].contains("updates a weight of shape [5, 6], but the base's is [4, 6]"));
    let complaints = problems(plan(root, &[("a", 4, 6), ("c", 4, 6), ("d", 4, 6)], ""));
    assert_eq!(complaints.len(), 2);
}

#[test]
fn a_head_that_is_tied_away_is_explained() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    base(root, &[("a.weight", [4, 6])], r#"{"tie_word_embeddings": true}"#);
    let complaints = problems(plan(root, &[("a", 4, 6), ("lm_head", 9, 6)], ""));
    assert!(complaints[0].contains("tied to the input embeddings"), "{complaints:?}");
}

#[test]
fn a_weight_of_integers_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let header = r#"{"a.weight":{"dtype":"I8","shape":[4,6],"data_offsets":[0,24]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + 24, 0);
    std::fs::create_dir_all(root.join("base")).expect("made");
    std::fs::write(root.join("base/model.safetensors"), bytes).expect("written");
    let complaints = problems(plan(root, &[("a", 4, 6)], ""));
    assert!(complaints[0].contains("I8: merge into the unquantised base"), "{complaints:?}");
}

#[test]
fn shape_decides_the_orientation_whatever_the_flag() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    base(root, &[("c_attn.weight", [4, 12]), ("q.weight", [12, 4])], "");
    for flag in ["false", "true"] {
        let fields = format!(r#", "fan_in_fan_out": {flag}"#);
        let plan = plan(root, &[("c_attn", 12, 4), ("q", 12, 4)], &fields).expect("fits");
        assert_eq!(merged(&plan), [("c_attn.weight".into(), true), ("q.weight".into(), false)]);
        assert!(plan.notes[0].contains("fan_in_fan_out in its config does not fit 1"));
    }
}

#[test]
fn a_bias_shows_that_a_weight_is_stored_transposed() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let config = r#"{"model_type": "own"}"#;
    base(root, &[("x.weight", [4, 12]), ("x.bias", [1, 12])], config);
    assert!(problems(plan(root, &[("x", 12, 4)], ""))[0].contains("updates a weight of shape"));
    let bias = ("x.bias", Dtype::F32, &[12][..], ramp(12, 1));
    let weight = ("x.weight", Dtype::F32, &[4, 12][..], ramp(48, 2));
    write(&root.join("base/model.safetensors"), &[weight, bias]);
    let plan = plan(root, &[("x", 12, 4)], "").expect("fits");
    assert_eq!(merged(&plan), [("x.weight".into(), true)]);
}

#[test]
fn architecture_decides_for_square_weights() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let square = [("h.0.c_proj.weight", [4, 4]), ("h.0.q.weight", [4, 4])];
    let modules = [("h.0.c_proj", 4, 4), ("h.0.q", 4, 4)];
    let transposed = |config: &str| {
        base(root, &square, config);
        merged(&plan(root, &modules, "").expect("fits"))
            .into_iter()
            .map(|(_, transposed)| transposed)
            .collect::<Vec<_>>()
    };
    assert_eq!(transposed(r#"{"model_type": "gpt2"}"#), [true, false]);
    assert_eq!(transposed(r#"{"decoder": {"model_type": "gpt2"}}"#), [true, false]);
    assert_eq!(transposed(r#"{"model_type": "gpt_bigcode"}"#), [false, false]);
    std::fs::remove_file(root.join("base/config.json")).expect("removed");
    let complaints = problems(plan(root, &modules, ""));
    assert!(complaints[0].contains("put the base's config.json"), "{complaints:?}");

    // The bias of a weight that is not square tells, too.
    for (shape, expected) in [([4, 8], true), ([8, 4], false)] {
        let tensors = [
            ("h.0.c_proj.weight", Dtype::F32, &[4, 4][..], ramp(16, 1)),
            ("h.0.c_fc.weight", Dtype::F32, &shape[..], ramp(32, 1)),
            ("h.0.c_fc.bias", Dtype::F32, &[8][..], ramp(8, 1)),
        ];
        write(&root.join("base/model.safetensors"), &tensors);
        let plan = plan(root, &modules[..1], "").expect("fits");
        assert_eq!(merged(&plan), [("h.0.c_proj.weight".into(), expected)]);
    }
}

#[test]
fn an_untrained_adapter_is_a_warning() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    base(root, &[("a.weight", [4, 6])], "");
    write_adapter(&root.join("adapter"), &[], "");
    let tensors = [
        ("base_model.model.a.lora_A.weight", Dtype::F32, &[2, 6][..], ramp(12, 1)),
        (
            "base_model.model.a.lora_B.weight",
            Dtype::F32,
            &[4, 2][..],
            vec![0.0, -0.0, 0.0, -0.0, 0.0, 0.0, 0.0, -0.0],
        ),
    ];
    write(&root.join("adapter/adapter_model.safetensors"), &tensors);
    let plan =
        Plan::new(&open(&root.join("base"), &[root.join("adapter")]), plain()).expect("fits");
    assert!(plan.warnings[0].contains("all zero in 1 of 1 module"), "{:?}", plan.warnings);
}

#[test]
fn weights_belong_to_the_weighted_strategy() {
    let weights = |strategy, given: Option<Vec<f64>>, count| {
        let weights = given.map(|given| given.into_iter().map(Weight::All).collect());
        ModuleWeights::of(&Options { strategy, weights, ..plain() }, count).map(|weights| {
            (0..count).map(|adapter| weights.factor(adapter, "any")).collect::<Vec<f64>>()
        })
    };
    assert_eq!(weights(Strategy::Sequential, None, 2).expect("fine"), [1.0, 1.0]);
    assert_eq!(weights(Strategy::Weighted, None, 2).expect("fine"), [1.0, 1.0]);
    assert_eq!(weights(Strategy::Average, None, 4).expect("fine"), [0.25; 4]);
    assert_eq!(weights(Strategy::Weighted, Some(vec![0.5, -2.0]), 2).expect("fine"), [0.5, -2.0]);
    let normalized = weights(Strategy::Gram("normalized"), Some(vec![1.0, 3.0]), 2);
    assert_eq!(normalized.expect("fine"), [0.25, 0.75]);
    let complaint =
        |strategy, given, count| weights(strategy, given, count).expect_err("refused").to_string();
    assert!(complaint(Strategy::Weighted, Some(vec![1.0]), 2).contains("1 weight was given for 2"));
    assert!(complaint(Strategy::Weighted, Some(vec![f64::NAN]), 1).contains("not a finite"));
    assert!(complaint(Strategy::Average, Some(vec![1.0]), 1).contains("only the strategy"));
    assert!(complaint(Strategy::Sequential, None, 0).contains("at least one"));
}

#[test]
fn new_sizes_make_a_new_layout_and_the_old_one_is_kept_to_the_byte() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let tensors = [
        ("odd", Dtype::F16, &[3][..], ramp(3, 1)),
        ("a.weight", Dtype::F32, &[4, 6][..], ramp(24, 2)),
    ];
    write(&root.join("base/model.safetensors"), &tensors);
    let adapter = write_adapter(&root.join("adapter"), &[("a", 4, 6)], "");
    let inputs = open(&root.join("base"), &[adapter]);
    let same = Plan::new(&inputs, plain()).expect("fits");
    assert_eq!(same.shards[0].header, inputs.base.shards()[0].file.header_bytes());
    assert_eq!(same.tensor_bytes(), 6 + 96);
    let options = Options { dtype: Some(Dtype::Bf16), ..plain() };
    let cast = Plan::new(&inputs, options).expect("fits");
    assert_eq!(cast.tensor_bytes(), 6 + 48);
    assert_eq!(
        (
            cast.count(PlannedChange::Cast),
            cast.count(PlannedChange::Merge),
            cast.count(PlannedChange::Copy)
        ),
        (1, 1, 0)
    );
    assert_eq!(cast.bytes(), cast.shards[0].header.len() as u64 + 54);
}

const TIED: &str = r#"{"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": true,
    "vocab_size": 5}"#;

/// An adapter that holds these parameters whole and nothing else.
fn saving(root: &Path, parameters: &[(&str, [u64; 2])], modules: &str) -> Result<Plan> {
    let adapter = write_adapter(&root.join("adapter"), &[], modules);
    let tensors: Vec<_> = parameters
        .iter()
        .map(|(name, shape)| (*name, Dtype::F32, &shape[..], ramp(shape[0] * shape[1], 9)))
        .collect();
    write(&root.join("adapter/adapter_model.safetensors"), &tensors);
    Plan::new(&open(&root.join("base"), &[adapter]), plain())
}

#[test]
fn embeddings_trained_apart_leave_their_head_as_it_was() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let fields = r#", "modules_to_save": ["embed_tokens"]"#;
    let implied = r#"{"architectures": ["GPT2LMHeadModel"]}"#;
    for (config, origin) in [(TIED, Some(Origin::Base(0))), (implied, Some(Origin::Base(0)))] {
        base(root, &[("embed_tokens.weight", [5, 4]), ("x.weight", [4, 4])], config);
        let plan = saving(root, &[("embed_tokens.weight", [5, 4])], fields).expect("fits");
        let head = plan.tensors().find(|(_, tensor)| tensor.name == "lm_head.weight");
        assert_eq!(head.map(|(_, tensor)| tensor.origin), origin);
        assert_eq!(plan.config_changes.tied, Some(false));
    }
    // A model without a language head has none to untie; a whole saved embedding is not apart.
    base(root, &[("embed_tokens.weight", [5, 4])], r#"{"architectures": ["BertModel"]}"#);
    let plan = saving(root, &[("embed_tokens.weight", [5, 4])], fields).expect("fits");
    assert_eq!((plan.tensors().count(), plan.config_changes.tied), (1, None));
    base(root, &[("embed_tokens.weight", [5, 4])], TIED);
    let plan = saving(root, &[("embed_tokens.weight", [5, 4])], "").expect("fits");
    assert_eq!((plan.tensors().count(), plan.config_changes.tied), (1, None));
}

#[test]
fn a_vocabulary_changes_as_a_whole_or_not_at_all() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let names = [("embed_tokens.weight", [5, 4]), ("lm_head.weight", [5, 4])];
    base(root, &names, r#"{"tie_word_embeddings": false}"#);
    let both = [("embed_tokens.weight", [7, 4]), ("lm_head.weight", [7, 4])];
    let plan = saving(root, &both, "").expect("fits");
    assert_eq!(plan.config_changes.vocabulary, Some(7));
    let complaints = problems(saving(root, &both[..1], ""));
    assert!(complaints[0].contains("no adapter brings lm_head.weight"), "{complaints:?}");
    // A head with other labels is no vocabulary.
    base(root, &[("score.weight", [5, 4])], "");
    let complaints = problems(saving(root, &[("score.weight", [7, 4])], ""));
    assert!(complaints[0].contains("replaces score.weight of shape [5, 4]"), "{complaints:?}");
}
