use std::path::{Path, PathBuf};

use super::cache::Cache;
use super::products::{Block, Table};
use super::*;
use crate::adapter::format::AdapterSource;
use crate::error::Error;
use crate::fixtures::{self, ramp};
use crate::parallel::task::{Task, build_pool};
use crate::tensor::dtype::Dtype;

/// Adapters of rank 3, each with some of the modules.
fn adapters(folder: &Path, count: u64, modules: &[(&str, u64, u64)]) -> Vec<PathBuf> {
    let write = |number: u64| {
        let mut names = Vec::new();
        for (index, (module, outputs, inputs)) in modules.iter().enumerate() {
            if number % 3 == 1 && index == 1 {
                continue;
            }
            let name = |side| format!("base_model.model.{module}.lora_{side}.weight");
            let seed = number * 31 + index as u64;
            names.push((name("A"), [3, *inputs], ramp(3 * inputs, seed)));
            names.push((name("B"), [*outputs, 3], ramp(3 * outputs, seed + 7)));
        }
        let tensors: Vec<fixtures::Tensor<'_>> = names
            .iter()
            .map(|(name, shape, values)| (name.as_str(), Dtype::F32, &shape[..], values.clone()))
            .collect();
        let path = folder.join(format!("a{number}"));
        fixtures::write(&path.join("adapter_model.safetensors"), &tensors);
        let config = r#"{"peft_type": "LORA", "r": 3, "lora_alpha": 6}"#;
        std::fs::write(path.join("adapter_config.json"), config).expect("written");
        path
    };
    (0..count).map(write).collect()
}

const MODULES: [(&str, u64, u64); 4] = [("a", 12, 9), ("b", 8, 30), ("c", 5, 5), ("d", 40, 7)];

fn collect(paths: &[PathBuf]) -> Collection {
    let sources: Vec<_> = paths.iter().map(AdapterSource::at).collect();
    let pool = build_pool(Some(2)).expect("a pool");
    let (collection, failures) = Collection::open(&sources, &pool, &Task::new()).expect("opened");
    assert!(failures.is_empty());
    collection
}

fn options(cache: Option<PathBuf>, per_module: bool) -> Options {
    Options { precision: Precision::Double, per_module, memory: 1 << 20, cache }
}

fn all(collection: &Collection) -> Vec<Vec<usize>> {
    vec![(0..collection.members().len()).collect()]
}

fn run(collection: &Collection, options: &Options) -> Products {
    let pool = build_pool(Some(2)).expect("a pool");
    products(collection, &all(collection), options, &pool, &Task::new()).expect("products")
}

#[test]
fn a_block_goes_on_after_the_modules_that_are_done() {
    for per_module in [false, true] {
        let folder = tempfile::tempdir().expect("a folder");
        let whole = collect(&adapters(folder.path(), 5, &MODULES));
        let expected = run(&whole, &options(None, per_module));
        // What a run that was killed after two modules leaves: the sums so far.
        let mut begun = whole.clone();
        begun.modules.truncate(2);
        for member in &mut begun.members {
            member.pieces.retain(|piece| piece.module < 2);
        }
        let part = run(&begun, &options(None, per_module));
        let cache = folder.path().join("cache");
        let options = options(Some(cache.clone()), per_module);
        let block = Block::whole(&whole, &all(&whole)[0]);
        let written = Cache::open(&cache, &whole, std::slice::from_ref(&block), &options);
        let upper = |table: &[f64]| -> Vec<f64> {
            let above = |place: usize| place / 5 <= place % 5;
            table.iter().enumerate().map(|(i, v)| if above(i) { *v } else { 0.0 }).collect()
        };
        let table = Table {
            next: 2,
            all: upper(&part.all),
            modules: part.modules.iter().map(|table| upper(table)).collect(),
            was_found: false,
        };
        written.expect("a cache").save(0, &table).expect("saved");
        let resumed = run(&whole, &options);
        assert_eq!(resumed.found, 0, "only a part was there");
        assert_eq!(resumed.all, expected.all);
        assert_eq!(resumed.modules, expected.modules);
        let again = run(&whole, &options);
        assert_eq!(again.found, 1);
        assert_eq!(again.all, expected.all);
    }
}

#[test]
fn a_begun_block_is_taken_at_its_word() {
    // Otherwise the test above would pass with a cache that is never read.
    let folder = tempfile::tempdir().expect("a folder");
    let whole = collect(&adapters(folder.path(), 3, &MODULES));
    let options = options(Some(folder.path().join("cache")), false);
    let block = Block::whole(&whole, &all(&whole)[0]);
    let cache = Cache::open(
        options.cache.as_deref().expect("set"),
        &whole,
        std::slice::from_ref(&block),
        &options,
    )
    .expect("a cache");
    let table = Table { next: 4, all: vec![7.0; 9], ..Table::default() };
    cache.save(0, &table).expect("saved");
    assert_eq!(run(&whole, &options).all, vec![7.0; 9]);
}

#[cfg(unix)]
#[test]
fn a_cache_that_cannot_be_written_costs_no_work_and_no_pipe_is_opened() {
    let folder = tempfile::tempdir().expect("a folder");
    let whole = collect(&adapters(folder.path(), 3, &MODULES));
    let expected = run(&whole, &options(None, false));
    let options = options(Some(folder.path().join("cache")), false);
    assert_eq!(run(&whole, &options).unsaved, None);
    let products = std::fs::read_dir(folder.path().join("cache")).expect("made").next();
    let block = products.expect("one").expect("an entry").path().join("block-000000");
    // What lies there is no file: neither read, which a pipe would make wait, nor replaced.
    std::fs::remove_file(&block).expect("removed");
    std::fs::create_dir_all(block.join("mine")).expect("made");
    let result = run(&whole, &options);
    assert_eq!(result.all, expected.all);
    assert!(result.unsaved.expect("said").contains("block-000000"));
}

#[test]
fn a_cancelled_job_ends() {
    let folder = tempfile::tempdir().expect("a folder");
    let collection = collect(&adapters(folder.path(), 3, &MODULES));
    let task = Task::new();
    task.cancel();
    let pool = build_pool(Some(2)).expect("a pool");
    let result = products(&collection, &all(&collection), &options(None, false), &pool, &task);
    assert!(matches!(result, Err(Error::Cancelled)));
    let result = relations(&collection, &[(0, 1)], &pool, &task);
    assert!(matches!(result, Err(Error::Cancelled)));
    assert!(matches!(drift(&collection, &[0, 1], &pool, &task), Err(Error::Cancelled)));
    assert!(matches!(signatures(&collection, &[0], &pool, &task), Err(Error::Cancelled)));
}

#[test]
fn a_file_that_changed_meanwhile_is_an_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let paths = adapters(folder.path(), 3, &MODULES);
    let collection = collect(&paths);
    let weights = paths[1].join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&weights).expect("read");
    bytes.truncate(bytes.len() - 8);
    std::fs::write(&weights, bytes).expect("written");
    let pool = build_pool(Some(2)).expect("a pool");
    let all = all(&collection);
    let error = products(&collection, &all, &options(None, false), &pool, &Task::new());
    let message = error.expect_err("changed").to_string();
    assert!(message.contains("changed while it was read; run again"), "{message}");
    let signed = signatures(&collection, &[0, 1], &pool, &Task::new()).expect("not cancelled");
    assert!(signed[0].is_ok() && signed[1].is_err());
}

#[test]
fn work_counts_each_pair_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let collection = collect(&adapters(folder.path(), 2, &[("a", 12, 9)]));
    // One tile of six ranks, multiplied with itself.
    assert_eq!(work(&collection, &all(&collection)), 6 * 6 * 21);
}
