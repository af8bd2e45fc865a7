use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::kohya::Kohya;
use super::peft::Peft;
use crate::adapter::format::{AdapterSource, Format, WriteOptions};
use crate::adapter::{Adapter, grammar};
use crate::checkpoint::Checkpoint;
use crate::error::Error;
use crate::fixtures::{ramp, write, write_adapter};
use crate::parallel::task::Task;
use crate::storage::memory::InMemory;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::Tensor;

const MODULES: [(&str, u64, u64); 3] = [
    ("model.layers.0.q_proj", 6, 5),
    ("model.layers.0.up_proj", 9, 5),
    ("model.layers.1.q_proj", 6, 5),
];
const PATTERNS: &str =
    r#", "alpha_pattern": {"layers.1.q_proj": 0.1}, "base_model_name_or_path": "b""#;

fn as_it_is() -> WriteOptions<'static> {
    WriteOptions::default()
}

/// What each module adds, by its path: the scale, and the factors in f64.
fn updates(adapter: &Adapter) -> Vec<(String, f64, Vec<f64>, Vec<f64>)> {
    let mut all: Vec<_> = (adapter.modules().values())
        .map(|module| {
            let (a, b) = module.delta.plain().expect("plain");
            let (a, b) = (a.read_f64().expect("read"), b.read_f64().expect("read"));
            (module.path.clone(), module.scaling, a, b)
        })
        .collect();
    all.sort_by(|left, right| left.0.cmp(&right.0));
    all
}

fn base(root: &Path) -> Checkpoint {
    let path = root.join("model.safetensors");
    let shapes =
        MODULES.map(|(name, outputs, inputs)| (format!("{name}.weight"), [outputs, inputs]));
    let tensors: Vec<_> = (shapes.iter())
        .map(|(name, shape)| (name.as_str(), Dtype::F32, &shape[..], ramp(shape[0] * shape[1], 3)))
        .collect();
    write(&path, &tensors);
    Checkpoint::open(&path).expect("sound")
}

#[test]
fn what_was_read_from_peft_s_files_is_written_as_it_was() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let first = write_adapter(&root.join("first"), &MODULES, PATTERNS);
    let adapter = Adapter::open(&first).expect("sound");
    Peft.write(&adapter, &root.join("second"), &as_it_is()).expect("written");
    let again = Adapter::open(&root.join("second")).expect("sound");
    assert_eq!(updates(&again), updates(&adapter));
    assert_eq!(again.settings(), adapter.settings());
    let tensors = |adapter: &Adapter| adapter.file().header().tensors.clone();
    assert_eq!(tensors(&again), tensors(&adapter));
    assert_eq!(fs::read_dir(root.join("second")).expect("listed").count(), 2);
}

#[test]
fn peft_to_kohya_and_back_adds_the_same() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let base = base(root);
    let first = write_adapter(&root.join("first"), &MODULES, PATTERNS);
    let adapter = Adapter::open(&first).expect("sound");
    let file = root.join("style.safetensors");
    Kohya.write(&adapter, &file, &as_it_is()).expect("written");
    let flat = Adapter::open(&file).expect("sound");
    assert_eq!(flat.format(), "kohya");
    assert!(flat.modules().contains_key("lora_unet_model_layers_0_q_proj"));
    let named = grammar::resolve(&flat, &base).expect("fits").expect("flattened");
    assert_eq!(updates(&named), updates(&adapter));
    let flattened = Peft.write(&flat, &root.join("third"), &as_it_is()).expect_err("no dots");
    assert!(flattened.to_string().contains("give the base"), "{flattened}");
    Peft.write(&named, &root.join("third"), &as_it_is()).expect("written");
    let back = Adapter::open(&root.join("third")).expect("sound");
    assert_eq!((back.format(), updates(&back)), ("peft", updates(&adapter)));
}

#[test]
fn what_is_written_has_the_type_that_was_asked_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let adapter = Adapter::open(&write_adapter(&root.join("first"), &MODULES, "")).expect("sound");
    let options = WriteOptions { dtype: Some(Dtype::F16), ..as_it_is() };
    Peft.write(&adapter, &root.join("peft"), &options).expect("written");
    Kohya.write(&adapter, &root.join("kohya.safetensors"), &options).expect("written");
    for path in ["peft", "kohya.safetensors"] {
        let narrow = Adapter::open(&root.join(path)).expect("sound");
        for ((_, _, own, _), (_, _, wide, _)) in updates(&narrow).iter().zip(updates(&adapter)) {
            let rounded = |value: &f64| f64::from(half::f16::from_f64(*value));
            assert_eq!(*own, wide.iter().map(rounded).collect::<Vec<_>>());
        }
        for module in narrow.modules().values() {
            assert_eq!(module.delta.plain().expect("plain").0.dtype, Dtype::F16);
        }
    }
    let tiny = WriteOptions { dtype: Some(Dtype::F16), ..as_it_is() };
    let large = Tensor::in_memory(root, "x", Dtype::F32, vec![1], 1e6f32.to_le_bytes().to_vec());
    let narrow = tiny.cast(&large.expect("one number")).expect("made when it is read");
    let error = narrow.read().expect_err("too large");
    assert!(error.to_string().contains("x has values too large for F16"), "{error}");
}

#[test]
fn an_adapter_in_memory_is_the_one_in_its_files() {
    let directory = tempfile::tempdir().expect("a directory");
    let first = write_adapter(&directory.path().join("first"), &MODULES, PATTERNS);
    let names = ["adapter_config.json", "adapter_model.safetensors"];
    let read = |name: &str| Arc::new(fs::read(first.join(name)).expect("read"));
    let files = names.map(|name| (name.to_owned(), read(name))).into();
    let store = InMemory { name: "memory".into(), files };
    let source = AdapterSource::in_store(Arc::new(store.clone()));
    let adapter = source.open(&Task::new()).expect("sound");
    assert_eq!(updates(&adapter), updates(&Adapter::open(&first).expect("sound")));
    adapter.check_unchanged().expect("nobody can change it");
    let alone = InMemory { files: [(names[1].to_owned(), read(names[1]))].into(), ..store };
    let error = AdapterSource::in_store(Arc::new(alone)).open(&Task::new()).expect_err("no config");
    assert!(error.to_string().starts_with("memory"), "{error}");
}

#[test]
fn what_a_format_cannot_say_is_refused_by_name() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let file = root.join("style.safetensors");
    let refused = |fields: &str, name: &str| {
        let adapter = Adapter::open(&write_adapter(&root.join(name), &MODULES, fields));
        let error = Kohya.write(&adapter.expect("sound"), &file, &as_it_is()).expect_err("refused");
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(!file.exists());
        error.to_string()
    };
    assert!(refused(r#", "init_lora_weights": "pissa""#, "pissa").contains("changed the base"));
    let ranges = r#", "layer_replication": [[0, 1], [0, 2]]"#;
    assert!(refused(ranges, "repeated").contains("changed the base"));
}
