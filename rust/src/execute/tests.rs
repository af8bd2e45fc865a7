use std::fs;

use super::*;
use crate::fixtures::{open, plain, ramp, write, write_adapter};
use crate::kernel::convert::widen_f64;
use crate::plan;
use crate::safetensors::SafetensorsFile;

const ROWS: u64 = 70;
const COLUMNS: u64 = 90;

/// A base of two shards with an index and a side file, and an adapter for two of its weights.
fn prepare(root: &Path) -> Inputs {
    let base = root.join("base");
    for (shard, name) in ["one", "two"].iter().enumerate() {
        let weight = format!("{name}.weight");
        let tensors = [
            (weight.as_str(), Dtype::Bf16, &[ROWS, COLUMNS][..], ramp(ROWS * COLUMNS, 5)),
            ([*name, "norm"][1 - shard], Dtype::F32, &[7][..], ramp(7, 6)),
        ];
        write(&base.join(format!("{name}.safetensors")), &tensors);
    }
    let map = r#"{"metadata": {"total_size": 1, "kept": "yes"},
        "weight_map": {"one.weight": "one.safetensors", "norm": "one.safetensors",
                       "two.weight": "two.safetensors", "two": "two.safetensors"}}"#;
    fs::write(base.join("model.safetensors.index.json"), map).expect("written");
    fs::write(base.join("config.json"), r#"{"torch_dtype": "bfloat16", "a": 1}"#).expect("written");
    fs::write(base.join("pytorch_model.bin"), "other weights").expect("written");
    fs::create_dir_all(base.join("sub")).expect("made");
    fs::write(base.join("sub/notes.txt"), "carried").expect("written");
    let adapter = write_adapter(&root.join("adapter"), &[("one", ROWS, COLUMNS)], "");
    open(&base, &[adapter])
}

fn run(inputs: &Inputs, options: plan::Options, output: &Path, threads: usize) -> Result<Summary> {
    let plan = Plan::new(inputs, options)?;
    let options = Options { threads: Some(threads), ..Options::default() };
    execute(inputs, &plan, output, &options, &Task::new())
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .expect("a directory")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn a_merge_writes_the_whole_model_and_nothing_else() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let inputs = prepare(root);
    let output = root.join("deep/output");
    let summary = run(&inputs, plain(), &output, 2).expect("merged");
    assert_eq!(summary.left_out, ["pytorch_model.bin"]);
    assert_eq!(
        names(&output),
        [
            "config.json",
            "model.safetensors.index.json",
            "one.safetensors",
            "sub",
            "two.safetensors"
        ]
    );
    let same = |name: &str| {
        fs::read(output.join(name)).expect("read")
            == fs::read(root.join("base").join(name)).expect("read")
    };
    assert!(same("two.safetensors") && same("config.json") && same("sub/notes.txt"));
    let index = fs::read_to_string(output.join("model.safetensors.index.json")).expect("read");
    let size = 2 * (ROWS * COLUMNS * 2 + 28);
    assert!(
        index.contains(&format!("\"total_size\": {size}")) && index.contains("\"kept\": \"yes\"")
    );

    let file = SafetensorsFile::open(&output.join("one.safetensors")).expect("sound");
    let merged = file.tensor("one.weight").expect("there");
    let merged = widen_f64(&merged.dtype, file.tensor_bytes(merged));
    let adapter = &inputs.adapters[0];
    let module = &adapter.modules()["one"];
    let (a, b) = (adapter.read_f64(&module.a), adapter.read_f64(&module.b));
    let base = ramp(ROWS * COLUMNS, 5);
    for (index, (merged, base)) in merged.iter().zip(base).enumerate() {
        let (row, column) = (index / COLUMNS as usize, index % COLUMNS as usize);
        let product: f64 = (0..2).map(|k| b[row * 2 + k] * a[k * COLUMNS as usize + column]).sum();
        let base = half::bf16::from_f32(base).to_f64();
        let expected = half::bf16::from_f64(base + 2.0 * product).to_f64();
        assert_eq!(*merged, expected, "row {row}, column {column}");
    }
}

#[test]
fn the_bytes_do_not_depend_on_threads() {
    let directory = tempfile::tempdir().expect("a directory");
    let inputs = prepare(directory.path());
    for dtype in [None, Some(Dtype::F32), Some(Dtype::F16)] {
        let outputs: Vec<_> = [1, 2, 7]
            .iter()
            .map(|threads| {
                let output = directory.path().join(format!("{threads}-{dtype:?}"));
                let options = plan::Options { dtype: dtype.clone(), ..plain() };
                run(&inputs, options, &output, *threads).expect("merged");
                ["one", "two"]
                    .map(|name| fs::read(output.join(format!("{name}.safetensors"))).expect("read"))
            })
            .collect();
        assert!(outputs[0] == outputs[1] && outputs[0] == outputs[2]);
    }
}

#[test]
fn a_converted_model_says_so_in_its_config() {
    let directory = tempfile::tempdir().expect("a directory");
    let inputs = prepare(directory.path());
    let output = directory.path().join("output");
    run(&inputs, plan::Options { dtype: Some(Dtype::F32), ..plain() }, &output, 1).expect("merged");
    let config = fs::read_to_string(output.join("config.json")).expect("read");
    assert!(config.contains(r#""torch_dtype": "float32""#), "{config}");
    let file = SafetensorsFile::open(&output.join("two.safetensors")).expect("sound");
    assert_eq!(file.tensor("two.weight").expect("there").dtype, Dtype::F32);
}

#[test]
fn failure_leaves_the_output_as_it_was() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let inputs = prepare(root);
    let task = Task::new();
    task.cancel();
    let plan = Plan::new(&inputs, plain()).expect("fits");
    let options = Options::default();
    let output = root.join("new/output");
    let cancelled = execute(&inputs, &plan, &output, &options, &task).expect_err("cancelled");
    assert!(matches!(cancelled, Error::Cancelled));
    assert!(!root.join("new").exists());

    let kept = root.join("kept");
    fs::create_dir(&kept).expect("made");
    fs::write(kept.join("mine.txt"), "mine").expect("written");
    let refused = execute(&inputs, &plan, &kept, &options, &Task::new()).expect_err("occupied");
    assert!(refused.to_string().contains("not empty"));
    let overwrite = Options { overwrite: true, ..Options::default() };
    execute(&inputs, &plan, &kept, &overwrite, &task).expect_err("cancelled");
    assert_eq!(names(&kept), ["mine.txt"]);
    fs::write(kept.join("model-00009-of-00009.safetensors"), "stale").expect("written");
    execute(&inputs, &plan, &kept, &overwrite, &Task::new()).expect("merged");
    assert!(names(&kept).contains(&"mine.txt".to_owned()));
    assert!(!names(&kept).contains(&"model-00009-of-00009.safetensors".to_owned()));
}

#[test]
fn what_a_killed_merge_left_is_started_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let inputs = prepare(directory.path());
    let output = directory.path().join("output");
    fs::create_dir_all(output.join(writer::STAGING).join("model")).expect("made");
    fs::write(output.join(writer::STAGING).join("model/stale.safetensors"), "half")
        .expect("written");
    run(&inputs, plain(), &output, 1).expect("merged");
    assert!(!names(&output).iter().any(|name| name.contains("stale") || name == writer::STAGING));
}

#[test]
fn two_merges_into_one_place_do_not_meet() {
    let directory = tempfile::tempdir().expect("a directory");
    let inputs = prepare(directory.path());
    let output = directory.path().join("output");
    let first = Staging::create(&inputs, &output, false, 0).expect("the first");
    let second = Staging::create(&inputs, &output, false, 0).expect_err("the second");
    assert!(second.to_string().contains("another merge is writing there"));
    assert!(output.join(writer::STAGING).exists(), "the first one's place is still there");
    drop(first);
    assert!(!output.exists());
}

#[test]
fn the_output_is_never_the_input() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let inputs = prepare(root);
    let complaint =
        |output: &Path| run(&inputs, plain(), output, 1).expect_err("refused").to_string();
    assert!(complaint(&root.join("base")).contains("is the base itself"));
    assert!(complaint(&root.join("adapter/../base")).contains("is the base itself"));
    assert!(complaint(&root.join("base/merged")).contains("lies inside the base"));
    assert!(complaint(&root.join("adapter")).contains("is where the adapter"));
    assert!(complaint(&root.join("base/config.json")).contains("lies inside the base"));
    fs::write(root.join("file"), "").expect("written");
    assert!(complaint(&root.join("file")).contains("is not a directory"));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(root.join("base"), root.join("link")).expect("linked");
        assert!(complaint(&root.join("link")).contains("is the base itself"));
    }
    assert_eq!(names(&root.join("base")).len(), 6);
}

#[test]
fn an_overflow_names_its_tensor_and_leaves_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let huge = [("a.weight", Dtype::F16, &[4, 4][..], vec![60000.0; 16])];
    write(&root.join("base/model.safetensors"), &huge);
    let factors = [
        ("base_model.model.a.lora_A.weight", Dtype::F32, &[2, 4][..], vec![100.0; 8]),
        ("base_model.model.a.lora_B.weight", Dtype::F32, &[4, 2][..], vec![100.0; 8]),
    ];
    write_adapter(&root.join("adapter"), &[], "");
    let path = root.join("adapter/adapter_model.safetensors");
    write(&path, &factors);
    let output = root.join("output");
    let merge = || {
        let inputs = open(&root.join("base"), &[root.join("adapter")]);
        run(&inputs, plain(), &output, 1).expect_err("refused").to_string()
    };
    let message = merge();
    assert!(message.starts_with("tensor a.weight: the merge makes a finite weight"), "{message}");
    assert!(!output.exists());
    let mut poisoned = factors;
    poisoned[0].3[3] = f32::NAN;
    write(&path, &poisoned);
    let message = merge();
    assert!(message.contains("NaN or infinity in base_model.model.a.lora_A.weight"), "{message}");

    // An infinity of the base's own is carried through.
    let infinite = [("a.weight", Dtype::F16, &[1, 4][..], vec![f32::INFINITY; 4])];
    write(&root.join("base/model.safetensors"), &infinite);
    write_adapter(&root.join("adapter"), &[("a", 1, 4)], "");
    let inputs = open(&root.join("base"), &[root.join("adapter")]);
    run(&inputs, plain(), &output, 1).expect("merged");
}

#[test]
fn neighbours_in_the_queue_are_of_different_shards() {
    let unit = |shard| Work::Cast { shard, tensor: 0, elements: 0..1 };
    let queues = vec![vec![unit(0); 3], vec![unit(1)], vec![], vec![unit(3); 2]];
    let order: Vec<_> = interleave(queues)
        .iter()
        .map(|work| match work {
            Work::Cast { shard, .. } => *shard,
            _ => unreachable!("only casts were queued"),
        })
        .collect();
    assert_eq!(order, [0, 1, 0, 3, 0, 3]);
}
