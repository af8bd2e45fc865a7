use std::fs;

use super::*;
use crate::execute::execute;
use crate::fixtures::{open, plain, ramp, write, write_adapter};
use crate::plan::Options as PlanOptions;
use crate::tensor::dtype::Dtype;

const SHAPE: [u64; 2] = [40, 30];

/// A base of three shards, and an adapter for a weight of the first and of the last.
fn prepare(root: &Path) -> Inputs {
    let base = root.join("base");
    for (seed, name) in ["a", "b", "c"].iter().enumerate() {
        let weight = format!("{name}.weight");
        let values = ramp(SHAPE[0] * SHAPE[1], seed as u64);
        write(&base.join(format!("{name}.safetensors")), &[(&weight, Dtype::Bf16, &SHAPE, values)]);
    }
    let map = r#"{"metadata": {}, "weight_map": {"a.weight": "a.safetensors",
        "b.weight": "b.safetensors", "c.weight": "c.safetensors"}}"#;
    fs::write(base.join("model.safetensors.index.json"), map).expect("written");
    let modules = [("a", SHAPE[0], SHAPE[1]), ("c", SHAPE[0], SHAPE[1])];
    open(&base, &[write_adapter(&root.join("adapter"), &modules, "")])
}

fn assembled(inputs: &Inputs, written: &[WrittenShard], root: &Path, to: &str) -> Result<Summary> {
    let plan = Plan::new(inputs, plain()).expect("planned");
    let parts = (root.join("parts"), written);
    let parts = (parts.0.as_path(), parts.1);
    assemble(inputs, &plan, parts, &root.join(to), &Options::default(), &Task::new())
        .map(|(summary, _)| summary)
}

#[test]
fn parts_that_plan_again_make_the_same_model() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let inputs = prepare(root);
    let plan = Plan::new(&inputs, plain()).expect("planned");
    let whole = root.join("whole");
    let options = Options::default();
    execute(&inputs, &plan, &whole, &options, &Task::new()).expect("merged");
    assert_eq!(plan.groups(), [[0], [1], [2]]);
    let digest = plan.digest(&inputs).expect("read");
    let mut written = Vec::new();
    for group in plan.groups() {
        // As another process: it opens and plans again.
        let inputs = open(&root.join("base"), &[root.join("adapter")]);
        let plan = Plan::new(&inputs, plain()).expect("planned");
        assert_eq!(plan.digest(&inputs).expect("read"), digest);
        let parts = root.join("parts");
        let task = Task::new();
        written.extend(
            write_shards(&inputs, &plan, &group, &parts, &options, &task).expect("written"),
        );
    }
    let summary = assembled(&inputs, &written, root, "output").expect("assembled");
    let plan = Plan::new(&inputs, plain()).expect("planned");
    let (parts, adopted) = (root.join("parts"), root.join("adopted"));
    let options = Options { adopts: true, ..Options::default() };
    let parts = (parts.as_path(), written.as_slice());
    assemble(&inputs, &plan, parts, &adopted, &options, &Task::new()).expect("assembled");
    assert_eq!(summary.adapter_sha256.len(), 1);
    for name in ["a.safetensors", "b.safetensors", "c.safetensors", "lorafast_manifest.json"] {
        let read = |folder: &str| fs::read(root.join(folder).join(name)).expect("read");
        assert!(read("whole") == read("output"), "{name}");
        assert!(read("whole") == read("adopted"), "{name}");
    }
}

#[test]
fn what_is_not_the_part_that_was_written_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let inputs = prepare(root);
    let plan = Plan::new(&inputs, plain()).expect("planned");
    let (parts, options, task) = (root.join("parts"), Options::default(), Task::new());
    let written = write_shards(&inputs, &plan, &[0, 2], &parts, &options, &task).expect("written");
    let missing = assembled(&inputs, &written, root, "output").expect_err("no b");
    assert!(matches!(missing, Error::Io { .. }), "{missing}");
    let mut all = written;
    all.extend(write_shards(&inputs, &plan, &[1], &parts, &options, &task).expect("written"));
    let path = parts.join("b.safetensors");
    let mut content = fs::read(&path).expect("read");
    *content.last_mut().expect("not empty") ^= 1;
    fs::write(&path, content).expect("written");
    let damaged = assembled(&inputs, &all, root, "output").expect_err("another b");
    assert!(damaged.to_string().contains("write that part again"), "{damaged}");
    assert!(!root.join("output").exists());
    let unknown = write_shards(&inputs, &plan, &[3], &parts, &options, &task);
    assert!(matches!(unknown, Err(Error::Argument(_))));
}

#[test]
fn the_digest_tells_plans_and_inputs_apart() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let inputs = prepare(root);
    let digest = |inputs: &Inputs, options: PlanOptions| {
        Plan::new(inputs, options).expect("planned").digest(inputs).expect("read")
    };
    let first = digest(&inputs, plain());
    assert_eq!(digest(&inputs, plain()), first);
    let weighted = PlanOptions { weights: Some(vec![crate::plan::Weight::All(0.5)]), ..weighted() };
    assert_ne!(digest(&inputs, weighted), first);
    let wide = PlanOptions { dtype: Some(Dtype::F32), ..plain() };
    assert_ne!(digest(&inputs, wide), first);
    let path = root.join("adapter/adapter_model.safetensors");
    let mut content = fs::read(&path).expect("read");
    *content.last_mut().expect("not empty") ^= 1;
    fs::write(&path, content).expect("written");
    let again = open(&root.join("base"), &[root.join("adapter")]);
    assert_ne!(digest(&again, plain()), first);
}

fn weighted() -> PlanOptions {
    PlanOptions { strategy: crate::plan::Strategy::Weighted, ..plain() }
}
