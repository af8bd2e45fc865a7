use std::fs;

use super::*;
use crate::execute;
use crate::fixtures::{open, plain, ramp, write, write_adapter};
use crate::tensor::dtype::Dtype;
use crate::weights::Weight;

const ROWS: u64 = 40;
const COLUMNS: u64 = 50;

/// A base of two shards, an adapter on one weight of each, and their merge.
fn prepare(root: &Path) -> (Inputs, Plan) {
    let base = root.join("base");
    for name in ["one", "two"] {
        let weight = format!("{name}.weight");
        let norm = format!("{name}.norm");
        let tensors = [
            (weight.as_str(), Dtype::Bf16, &[ROWS, COLUMNS][..], ramp(ROWS * COLUMNS, 5)),
            (norm.as_str(), Dtype::F32, &[7][..], ramp(7, 6)),
        ];
        write(&base.join(format!("{name}.safetensors")), &tensors);
    }
    let map = r#"{"metadata": {"total_size": 1}, "weight_map": {
        "one.weight": "one.safetensors", "one.norm": "one.safetensors",
        "two.weight": "two.safetensors", "two.norm": "two.safetensors"}}"#;
    fs::write(base.join("model.safetensors.index.json"), map).expect("written");
    fs::write(base.join("config.json"), r#"{"tie_word_embeddings": true}"#).expect("written");
    let modules = [("one", ROWS, COLUMNS), ("two", ROWS, COLUMNS)];
    let adapter = write_adapter(&root.join("adapter"), &modules, "");
    let inputs = open(&base, &[adapter]);
    let plan = Plan::new(&inputs, plain()).expect("fits");
    let options = execute::Options::default();
    execute::execute(&inputs, &plan, &root.join("merged"), &options, &Task::new()).expect("merged");
    (inputs, plan)
}

fn problems(inputs: &Inputs, plan: &Plan, merged: &Path) -> Vec<String> {
    let outcome = verify(inputs, plan, merged, &Options::default(), &Task::new()).expect("read");
    outcome.problems
}

/// Flips a bit of one byte of a tensor's data.
fn flip(path: &Path, tensor: &str, byte: usize, bit: u8) {
    let file = crate::tensor::safetensors::TensorFile::open(path).expect("sound");
    let start = file.data_start() + file.tensor(tensor).expect("there").range.start;
    drop(file);
    let mut bytes = fs::read(path).expect("read");
    bytes[start as usize + byte] ^= bit;
    fs::write(path, bytes).expect("written");
}

#[test]
fn a_right_merge_is_proved() {
    let directory = tempfile::tempdir().expect("a directory");
    let (inputs, plan) = prepare(directory.path());
    let merged = directory.path().join("merged");
    for full in [false, true] {
        let options = Options { full, ..Options::default() };
        let outcome = verify(&inputs, &plan, &merged, &options, &Task::new()).expect("read");
        assert_eq!(outcome.problems, Vec::<String>::new());
        assert_eq!((outcome.tensors_merged, outcome.tensors_copied), (2, 2));
        assert_eq!(outcome.elements, 2 * (ROWS * COLUMNS + 7));
        assert!(outcome.lost > 0.0 && outcome.lost < 0.1, "{}", outcome.lost);
        if full {
            assert_eq!(outcome.rows_exact, 2 * ROWS);
        }
    }
}

#[test]
fn a_merge_with_amx_is_proved_where_it_is_said_to_be_one() {
    let Some(amx) = InstructionSet::amx() else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    prepare(root);
    // Four of rank 2 make as many rank indices as tiles are used for.
    let inputs = open(&root.join("base"), &vec![root.join("adapter"); 4]);
    let plan = Plan::new(&inputs, plain()).expect("fits");
    let mut bytes = Vec::new();
    for threads in [1, 2] {
        let output = root.join(format!("amx-{threads}"));
        let options = execute::Options {
            threads: Some(threads),
            instruction_set: Some(amx),
            ..execute::Options::default()
        };
        execute::execute(&inputs, &plan, &output, &options, &Task::new()).expect("merged");
        let options =
            Options { full: true, arithmetic: Arithmetic::SplitFactors, ..Options::default() };
        let outcome = verify(&inputs, &plan, &output, &options, &Task::new()).expect("read");
        assert_eq!(outcome.problems, Vec::<String>::new());
        bytes.push(fs::read(output.join("one.safetensors")).expect("read"));
    }
    assert_eq!(bytes[0], bytes[1]);
}

#[test]
fn a_single_wrong_bit_is_found_wherever_it_is() {
    let directory = tempfile::tempdir().expect("a directory");
    let (inputs, plan) = prepare(directory.path());
    let merged = directory.path().join("merged");
    let shard = merged.join("one.safetensors");
    flip(&shard, "one.norm", 9, 1);
    assert!(problems(&inputs, &plan, &merged)[0].starts_with("tensor one.norm: row 2, column 0"));
    flip(&shard, "one.norm", 9, 1);
    assert!(problems(&inputs, &plan, &merged).is_empty());
    // Row 17, column 3, the second lowest bit: two units in the last place.
    let byte = (17 * COLUMNS as usize + 3) * 2;
    flip(&shard, "one.weight", byte, 2);
    let found = problems(&inputs, &plan, &merged);
    assert!(found[0].starts_with("tensor one.weight: row 17, column 3: is "), "{found:?}");
}

#[test]
fn a_lost_module_and_a_doubled_scale_are_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let (inputs, plan) = prepare(root);
    let merged = root.join("merged");
    fs::copy(root.join("base/two.safetensors"), merged.join("two.safetensors")).expect("copied");
    let found = problems(&inputs, &plan, &merged);
    assert!(
        found[0].starts_with("tensor two.weight") && found[0].contains("nothing had been merged")
    );
    let options = crate::plan::Options {
        strategy: crate::plan::Strategy::Weighted,
        weights: Some(vec![Weight::All(2.0)]),
        ..plain()
    };
    let doubled = Plan::new(&inputs, options).expect("fits");
    let output = root.join("doubled");
    let options = execute::Options::default();
    execute::execute(&inputs, &doubled, &output, &options, &Task::new()).expect("merged");
    let found = problems(&inputs, &plan, &output);
    assert_eq!(found.len(), 2);
    assert!(found[0].contains("times the right one"), "{found:?}");
}

#[test]
fn the_files_around_the_weights_are_checked() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let (inputs, plan) = prepare(root);
    let merged = root.join("merged");
    let index = merged.join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).expect("read");
    fs::write(&index, text.replace("\"total_size\": ", "\"total_size\": 1")).expect("written");
    assert!(problems(&inputs, &plan, &merged)[0].contains("total_size"));
    fs::write(&index, &text).expect("written");

    let (one, two) = (merged.join("one.safetensors"), merged.join("two.safetensors"));
    let between = root.join("between");
    fs::rename(&one, &between).expect("moved");
    fs::rename(&two, &one).expect("moved");
    fs::rename(&between, &two).expect("moved");
    assert!(problems(&inputs, &plan, &merged)[0].contains("but it stands in"));
    fs::rename(&two, &between).expect("moved");
    fs::rename(&one, &two).expect("moved");
    fs::rename(&between, &one).expect("moved");
    assert!(problems(&inputs, &plan, &merged).is_empty());
    fs::remove_file(merged.join("config.json")).expect("removed");
    assert!(problems(&inputs, &plan, &merged)[0].contains("config.json is missing"));
}

#[test]
fn a_stale_tied_head_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let tensors = |seed| {
        [
            ("lm_head.weight", Dtype::F32, &[6, 4][..], ramp(24, 1)),
            ("model.embed_tokens.weight", Dtype::F32, &[6, 4][..], ramp(24, seed)),
        ]
    };
    write(&root.join("base/model.safetensors"), &tensors(1));
    let config = r#"{"tie_word_embeddings": true}"#;
    fs::write(root.join("base/config.json"), config).expect("written");
    write_adapter(&root.join("adapter"), &[], r#", "modules_to_save": ["embed_tokens"]"#);
    let saved =
        [("base_model.model.model.embed_tokens.weight", Dtype::F32, &[6, 4][..], ramp(24, 2))];
    write(&root.join("adapter/adapter_model.safetensors"), &saved);
    let inputs = open(&root.join("base"), &[root.join("adapter")]);
    let plan = Plan::new(&inputs, plain()).expect("fits");
    write(&root.join("merged/model.safetensors"), &tensors(2));
    fs::write(root.join("merged/config.json"), config).expect("written");
    let found = problems(&inputs, &plan, &root.join("merged"));
    assert!(found[0].contains("one of the two is stale"), "{found:?}");
}

#[test]
fn a_change_below_the_types_resolution_is_a_warning() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    write(
        &root.join("base/model.safetensors"),
        &[("a.weight", Dtype::Bf16, &[8, 8][..], vec![1.0; 64])],
    );
    write_adapter(&root.join("adapter"), &[], "");
    let factors = [
        ("a.lora_A.weight", Dtype::F32, &[2, 8][..], vec![1e-2; 16]),
        ("a.lora_B.weight", Dtype::F32, &[8, 2][..], vec![1e-2; 16]),
    ];
    write(&root.join("adapter/adapter_model.safetensors"), &factors);
    let inputs = open(&root.join("base"), &[root.join("adapter")]);
    let plan = Plan::new(&inputs, plain()).expect("fits");
    let merged = root.join("merged");
    execute::execute(&inputs, &plan, &merged, &execute::Options::default(), &Task::new())
        .expect("merged");
    let outcome = verify(&inputs, &plan, &merged, &Options::default(), &Task::new()).expect("read");
    assert!(outcome.problems.is_empty());
    assert_eq!((outcome.lost, outcome.unmoved), (1.0, 1.0));
    assert!(outcome.warnings[0].contains("rounding took away 100 %"));
}
