use std::fs;
use std::sync::Arc;

use indexmap::IndexMap;

use super::*;
use crate::adapter::format::AdapterSource;
use crate::checkpoint::Checkpoint;
use crate::fixtures::{Tensor, open, plain, ramp, write, write_adapter};
use crate::kernel::convert::widen_f64;
use crate::plan;
use crate::storage::memory::{InMemory, MemoryDestination};
use crate::storage::staging;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::{TensorFile, TensorInfo};

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

fn overwriting() -> Options {
    Options { overwrite: true, ..Options::default() }
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
            "lorafast_manifest.json",
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

    let file = TensorFile::open(&output.join("one.safetensors")).expect("sound");
    let merged = file.tensor("one.weight").expect("there");
    let merged = widen_f64(&merged.dtype, &file.read(merged).expect("read"));
    let adapter = &inputs.adapters[0];
    let module = &adapter.modules()["one"];
    let (a, b) = module
        .delta
        .plain()
        .map(|(a, b)| (a.read_f64().expect("read"), b.read_f64().expect("read")))
        .expect("plain");
    let base = ramp(ROWS * COLUMNS, 5);
    for (index, (merged, base)) in merged.iter().zip(base).enumerate() {
        let (row, column) = (index / COLUMNS as usize, index % COLUMNS as usize);
        let product: f64 = (0..2).map(|k| b[row * 2 + k] * a[k * COLUMNS as usize + column]).sum();
        let base = half::bf16::from_f32(base).to_f64();
        let expected = half::bf16::from_f64(base + 2.0 * product).to_f64();
        assert_eq!(*merged, expected, "row {row}, column {column}");
    }
}

/// The files of a directory in memory, but for its folders.
fn in_memory(directory: &Path) -> InMemory {
    let entries = fs::read_dir(directory).expect("a directory");
    let paths = entries.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_file());
    let files = paths.map(|path| {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        (name, Arc::new(fs::read(&path).expect("read")))
    });
    InMemory { name: "memory".into(), files: files.collect() }
}

#[test]
fn a_merge_between_stores_in_memory_has_the_bytes_of_one_between_directories() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let inputs = prepare(root);
    run(&inputs, plain(), &root.join("output"), 2).expect("merged");
    let expected = in_memory(&root.join("output"));

    let task = Task::new();
    let base = Checkpoint::open_in(Arc::new(in_memory(&root.join("base"))), &task).expect("sound");
    let adapter = AdapterSource::in_store(Arc::new(in_memory(&root.join("adapter"))));
    let adapters = vec![Arc::new(adapter.open(&task).expect("sound"))];
    fs::remove_dir_all(root.join("base")).expect("removed");
    fs::remove_dir_all(root.join("adapter")).expect("removed");
    let stored = Inputs { base: Arc::new(base), adapters };
    let plan = Plan::new(&stored, plain()).expect("a plan");
    let output = MemoryDestination::new("memory");
    let options = Options::default();
    let (summary, lock) = execute_into(&stored, &plan, &output, &options, &task).expect("merged");
    let busy = execute_into(&stored, &plan, &output, &options, &task).expect_err("still locked");
    assert!(busy.to_string().contains("another merge is writing there"), "{busy}");
    drop(lock);
    assert_eq!(summary.side_files, ["config.json"]);
    assert_eq!(summary.left_out, ["pytorch_model.bin"]);
    let files = output.store().files;
    assert_eq!(files.len() + 1, expected.files.len(), "all but the manifest");
    assert!(files.iter().all(|(name, content)| expected.files[name] == *content));
    Checkpoint::open_in(Arc::new(output.store()), &task).expect("a model");

    let refused = execute_into(&stored, &plan, &output, &options, &task).expect_err("occupied");
    assert!(refused.to_string().starts_with("memory: holds a model"), "{refused}");
    let options = Options { overwrite: true, ..options };
    let cancelled = Task::new();
    cancelled.cancel();
    execute_into(&stored, &plan, &output, &options, &cancelled).expect_err("cancelled");
    assert!(output.store().files == files, "as it was");
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
    let file = TensorFile::open(&output.join("two.safetensors")).expect("sound");
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
    fs::create_dir_all(output.join(staging::DIRECTORY).join("model-1-0")).expect("made");
    fs::write(output.join(staging::DIRECTORY).join("model-1-0/stale.safetensors"), "half")
        .expect("written");
    run(&inputs, plain(), &output, 1).expect("merged");
    assert!(
        !names(&output).iter().any(|name| name.contains("stale") || name == staging::DIRECTORY)
    );
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

/// A base of one file and a rank-2 adapter from tensors, merged into f32, by name.
fn merge_tensors(
    base: &[Tensor<'_>],
    adapter: &[Tensor<'_>],
    fields: &str,
    options: plan::Options,
) -> (tempfile::TempDir, IndexMap<String, Vec<f64>>) {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    write(&root.join("base/model.safetensors"), base);
    write_adapter(&root.join("adapter"), &[], fields);
    write(&root.join("adapter/adapter_model.safetensors"), adapter);
    let inputs = open(&root.join("base"), &[root.join("adapter")]);
    run(&inputs, options, &root.join("output"), 2).expect("merged");
    let file = TensorFile::open(&root.join("output/model.safetensors")).expect("sound");
    let tensors = file.header().tensors.iter();
    let read = |tensor: &TensorInfo| widen_f64(&tensor.dtype, &file.read(tensor).expect("read"));
    let values = tensors.map(|tensor| (tensor.name.clone(), read(tensor))).collect();
    (directory, values)
}

/// Rows × columns of W + 2·B·A, with W, A and B as ramps of those seeds.
fn product(rows: usize, columns: usize) -> Vec<f64> {
    let weight = ramp((rows * columns) as u64, 1);
    let (a, b) = (ramp(2 * columns as u64, 2), ramp(2 * rows as u64, 3));
    (0..rows * columns)
        .map(|index| {
            let (row, column) = (index / columns, index % columns);
            let sum: f32 = (0..2).map(|k| b[row * 2 + k] * a[k * columns + column]).sum();
            f64::from(weight[index]) + 2.0 * f64::from(sum)
        })
        .collect()
}

#[track_caller]
fn assert_close(actual: &[f64], expected: &[f64]) {
    assert_eq!(actual.len(), expected.len());
    for (index, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let bound = 2e-6 * expected.abs().max(1.0);
        assert!((actual - expected).abs() <= bound, "{index}: {actual} for {expected}");
    }
}

#[test]
fn dora_gives_every_output_its_magnitude() {
    let (rows, columns) = (20, 30);
    let sum = product(rows, columns);
    let norm = |values: &mut dyn Iterator<Item = f64>| {
        values.map(|value| value * value).sum::<f64>().sqrt()
    };
    let magnitude: Vec<f32> = (0..rows).map(|row| 1.0 + row as f32 / 8.0).collect();
    let weight = [("x.weight", Dtype::F32, &[20, 30][..], ramp(600, 1))];
    let factors = [
        ("x.lora_A.weight", Dtype::F32, &[2, 30][..], ramp(60, 2)),
        ("x.lora_B.weight", Dtype::F32, &[20, 2][..], ramp(40, 3)),
        ("x.lora_magnitude_vector", Dtype::F32, &[20][..], magnitude.clone()),
    ];
    let dora = r#", "use_dora": true"#;
    let (_kept, merged) = merge_tensors(&weight, &factors, dora, plain());
    let expected: Vec<_> = (0..600)
        .map(|index| {
            let row = index / columns;
            let norm = norm(&mut sum[row * columns..][..columns].iter().copied());
            sum[index] * f64::from(magnitude[row]) / norm
        })
        .collect();
    assert_close(&merged["x.weight"], &expected);

    // Half of it: W₀ + ½·(W₁ − W₀).
    let half = plan::Options {
        strategy: plan::Strategy::Weighted,
        weights: Some(vec![plan::Weight::All(0.5)]),
        ..plain()
    };
    let (_kept, merged) = merge_tensors(&weight, &factors, dora, half);
    let base = ramp(600, 1);
    let between: Vec<_> =
        expected.iter().zip(&base).map(|(to, from)| (to + f64::from(*from)) / 2.0).collect();
    assert_close(&merged["x.weight"], &between);
}

#[test]
fn dora_on_an_embedding_scales_its_columns() {
    // Stored (tokens, width): 30 tokens of width 20, the transpose of the product above.
    let sum = product(20, 30);
    let straight = ramp(600, 1);
    let transposed: Vec<f32> =
        (0..600).map(|index| straight[index % 20 * 30 + index / 20]).collect();
    let magnitude: Vec<f32> = (0..20).map(|column| 2.0 - column as f32 / 16.0).collect();
    let factors = [
        ("x.lora_embedding_A", Dtype::F32, &[2, 30][..], ramp(60, 2)),
        ("x.lora_embedding_B", Dtype::F32, &[20, 2][..], ramp(40, 3)),
        ("x.lora_magnitude_vector", Dtype::F32, &[20][..], magnitude.clone()),
    ];
    let base = [("x.weight", Dtype::F32, &[30, 20][..], transposed)];
    let (_kept, merged) = merge_tensors(&base, &factors, r#", "use_dora": true"#, plain());
    let expected: Vec<_> = (0..600)
        .map(|index| {
            let (token, column) = (index / 20, index % 20);
            let output = &sum[column * 30..][..30];
            let norm = output.iter().map(|value| value * value).sum::<f64>().sqrt();
            output[token] * f64::from(magnitude[column]) / norm
        })
        .collect();
    assert_close(&merged["x.weight"], &expected);
}

#[test]
fn embeddings_convolutions_and_biases_are_products_too() {
    let straight = ramp(600, 1);
    let transposed: Vec<f32> =
        (0..600).map(|index| straight[index % 20 * 30 + index / 20]).collect();
    let base = [
        ("e.weight", Dtype::F32, &[30, 20][..], transposed),
        ("c.weight", Dtype::F32, &[20, 5, 3, 2][..], straight),
        ("c.bias", Dtype::F32, &[20][..], ramp(20, 4)),
    ];
    let factors = [
        ("e.lora_embedding_A", Dtype::F32, &[2, 30][..], ramp(60, 2)),
        ("e.lora_embedding_B", Dtype::F32, &[20, 2][..], ramp(40, 3)),
        ("c.lora_A.weight", Dtype::F32, &[2, 5, 3, 2][..], ramp(60, 2)),
        ("c.lora_B.weight", Dtype::F32, &[20, 2, 1, 1][..], ramp(40, 3)),
        ("c.lora_B.bias", Dtype::F32, &[20][..], ramp(20, 5)),
    ];
    let biased = r#", "lora_bias": true"#;
    let (_kept, merged) = merge_tensors(&base, &factors, biased, plain());
    let expected = product(20, 30);
    assert_close(&merged["c.weight"], &expected);
    let transposed: Vec<_> = (0..600).map(|index| expected[index % 20 * 30 + index / 20]).collect();
    assert_close(&merged["e.weight"], &transposed);
    let pairs = ramp(20, 4).into_iter().zip(ramp(20, 5));
    let bias: Vec<_> = pairs.map(|(base, bias)| f64::from(base) + 2.0 * f64::from(bias)).collect();
    assert_close(&merged["c.bias"], &bias);
}

#[test]
fn saved_parameters_replace_the_bases_or_join_them() {
    let base = [
        ("x.weight", Dtype::Bf16, &[4, 6][..], ramp(24, 1)),
        ("x.bias", Dtype::F32, &[4][..], ramp(4, 2)),
    ];
    let adapter = [
        ("base_model.model.x.base_layer.bias", Dtype::F16, &[4][..], ramp(4, 7)),
        ("base_model.model.score.weight", Dtype::F32, &[3, 6][..], ramp(18, 8)),
    ];
    let fields = r#", "bias": "all", "modules_to_save": ["score"]"#;
    let (_kept, merged) = merge_tensors(&base, &adapter, fields, plain());
    let exactly = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
    assert_eq!(merged["x.bias"], exactly(ramp(4, 7)));
    // In the type that most of the base has; these values are exact in it.
    assert_eq!(merged["score.weight"], exactly(ramp(18, 8)));
    assert_eq!(merged["x.weight"], exactly(ramp(24, 1)));

    let stray = [("base_model.model.other.weight", Dtype::F32, &[3, 6][..], ramp(18, 8))];
    let directory = tempfile::tempdir().expect("a directory");
    write(&directory.path().join("base/model.safetensors"), &base);
    let path = write_adapter(&directory.path().join("adapter"), &[("x", 4, 6)], fields);
    write(&path.join("adapter_model.safetensors"), &[&stray[..], &adapter[..1]].concat());
    let inputs = open(&directory.path().join("base"), &[path]);
    let problems = Plan::new(&inputs, plain()).expect_err("a stray tensor").to_string();
    assert!(problems.contains("other"), "{problems}");
}

#[test]
fn a_saved_embedding_of_another_size_changes_the_vocabulary() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let base = [("model.embed_tokens.weight", Dtype::F32, &[30, 20][..], ramp(600, 9))];
    write(&root.join("base/model.safetensors"), &base);
    let config = r#"{"vocab_size": 30, "tie_word_embeddings": true}"#;
    fs::write(root.join("base/config.json"), config).expect("written");
    let straight = ramp(640, 1);
    let adapter = [
        ("model.embed_tokens.lora_embedding_A", Dtype::F32, &[2, 32][..], ramp(64, 2)),
        ("model.embed_tokens.lora_embedding_B", Dtype::F32, &[20, 2][..], vec![0.0; 40]),
        ("model.embed_tokens.base_layer.weight", Dtype::F32, &[32, 20][..], straight.clone()),
        ("lm_head.weight", Dtype::F32, &[32, 20][..], straight.clone()),
    ];
    write_adapter(&root.join("adapter"), &[], "");
    write(&root.join("adapter/adapter_model.safetensors"), &adapter);
    let inputs = open(&root.join("base"), &[root.join("adapter")]);
    run(&inputs, plain(), &root.join("output"), 1).expect("merged");
    let file = TensorFile::open(&root.join("output/model.safetensors")).expect("sound");
    assert_eq!(file.header().tensors.len(), 1, "the tied head is not written twice");
    let tensor = file.tensor("model.embed_tokens.weight").expect("there");
    assert_eq!(tensor.shape, [32, 20]);
    let expected: Vec<_> = straight.into_iter().map(f64::from).collect();
    assert_eq!(widen_f64(&tensor.dtype, &file.read(tensor).expect("read")), expected);
    let config = fs::read_to_string(root.join("output/config.json")).expect("read");
    assert!(config.contains("\"vocab_size\": 32"), "{config}");
    assert!(config.contains("\"tie_word_embeddings\": true"), "{config}");
}

/// Rows of another executor's making come where the CPU's would have, and the rest is the CPU's.
#[test]
fn parts_of_an_execution_make_the_whole() {
    let directory = tempfile::tempdir().expect("a directory");
    let inputs = prepare(directory.path());
    let plan = Plan::new(&inputs, plain()).expect("planned");
    let (whole, parts) = (directory.path().join("whole"), directory.path().join("parts"));
    let task = Task::new();
    execute(&inputs, &plan, &whole, &Options::default(), &task).expect("merged");
    let merged = operands::changed_tensors(&plan);
    let [tensor] = merged.as_slice() else { panic!("one tensor is merged") };
    let id = tensor.id;
    let planned = &plan.shards[id.0].tensors[id.1];
    let session =
        Session::begin(&inputs, &plan, &LocalDirectory(parts.clone()), &Options::default(), &task)
            .expect("begun");
    session.run(&inputs, &plan, &WorkFilter::Without([id].into()), &task).expect("run");
    let mut rows = vec![0; (ROWS * COLUMNS) as usize * 2];
    session.read_rows(&inputs, planned, &(0..ROWS as usize), &mut rows).expect("read");
    let [update] =
        operands::operands(&inputs, planned, None).expect("read").try_into().expect("one");
    let pair = &update.products[0].pair;
    let set = InstructionSet::detect();
    let factors = crate::kernel::Factors::pack(
        set,
        &Dtype::Bf16,
        (ROWS as usize, COLUMNS as usize),
        crate::tensor::orientation::Orientation::OutIn,
        &[pair.operand(update.products[0].coefficient * update.weight)],
    );
    assert!(crate::kernel::merge_rows(set, &factors, 0, &Dtype::Bf16, &mut rows));
    let half = rows.len() / 2;
    session.write_rows(&plan, id, ROWS as usize / 2, &rows[half..]).expect("written");
    session.write_rows(&plan, id, 0, &rows[..half]).expect("written");
    assert!(!parts.join("config.json").exists(), "not a model yet");
    let (summary, lock) = session.finish(&inputs, &plan, &task).expect("finished");
    assert_eq!(summary.adapter_sha256.len(), 1);
    let busy =
        Session::begin(&inputs, &plan, &LocalDirectory(parts.clone()), &overwriting(), &task);
    assert!(busy.expect_err("still locked").to_string().contains("another merge is writing there"));
    assert_eq!(lock.release(), None);
    assert!(!parts.join(staging::DIRECTORY).exists());
    for name in ["one.safetensors", "two.safetensors", "config.json"] {
        let read = |root: &Path| fs::read(root.join(name)).expect("there");
        assert!(read(&whole) == read(&parts), "{name}");
    }
    // The merges of some tensors alone.
    let again = directory.path().join("again");
    let session =
        Session::begin(&inputs, &plan, &LocalDirectory(again.clone()), &Options::default(), &task)
            .expect("begun");
    session.run(&inputs, &plan, &WorkFilter::Without([id].into()), &task).expect("run");
    session.run(&inputs, &plan, &WorkFilter::Only([id].into()), &task).expect("run");
    session.finish(&inputs, &plan, &task).expect("finished");
    let read = |root: &Path| fs::read(root.join("one.safetensors")).expect("there");
    assert!(read(&whole) == read(&again));
}
