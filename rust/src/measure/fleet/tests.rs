use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::measure::Open;
use super::record::{adapter_columns, module_columns};
use super::*;
use crate::adapter::Adapter;
use crate::fixtures::{ramp, write, write_adapter};
use crate::measure::analysis;
use crate::measure::metrics::Number;
use crate::parallel::task::build_pool;
use crate::storage::digest::blake3_of;
use crate::tensor::dtype::Dtype;

const FULL: Level = Level { moments: true, spectra: true };

fn source(path: &Path) -> AdapterSource {
    AdapterSource::at(path)
}

fn scanned(paths: &[PathBuf], level: Level, threads: usize) -> BTreeMap<usize, Result<Scanned>> {
    let sources: Vec<_> = paths.iter().map(|path| source(path)).collect();
    let results = Mutex::new(BTreeMap::new());
    let pool = build_pool(Some(threads)).expect("a pool");
    let task = Task::new();
    scan(&sources, level, &pool, &task, &|position, result| {
        let before = results.lock().expect("sound").insert(position, result);
        assert!(before.is_none(), "delivered once");
    })
    .expect("not cancelled");
    let (done, total) = task.progress();
    assert!(done <= total, "{done} of {total}");
    results.into_inner().expect("sound")
}

/// An adapter whose modules and whose saved tensor are too large to be read at once.
fn write_large(directory: &Path) -> PathBuf {
    let modules: Vec<_> =
        (0..5u64).map(|index| (format!("layers.{index}.up"), 1 << 17, 300 + index)).collect();
    let mut tensors = Vec::new();
    let names: Vec<_> = modules
        .iter()
        .map(|(name, ..)| {
            ["A", "B"].map(|side| format!("base_model.model.{name}.lora_{side}.weight"))
        })
        .collect();
    let shapes: Vec<_> =
        modules.iter().map(|(_, outputs, inputs)| [[2, *inputs], [*outputs, 2]]).collect();
    for (index, (names, shapes)) in names.iter().zip(&shapes).enumerate() {
        for (name, shape) in names.iter().zip(shapes) {
            let values = ramp(shape[0] * shape[1], index as u64);
            tensors.push((name.as_str(), Dtype::F32, &shape[..], values));
        }
    }
    let saved = [(1 << 16) + 3, 70];
    let mut values = ramp(saved[0] * saved[1], 9);
    values[4_500_000] = f32::NAN;
    tensors.push(("base_model.model.head.weight", Dtype::F32, &saved, values));
    write(&directory.join("adapter_model.safetensors"), &tensors);
    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["head"]}"#;
    fs::write(directory.join("adapter_config.json"), config).expect("written");
    directory.to_path_buf()
}

fn cells(record: &Record, level: Level, name: &str) -> Vec<u64> {
    record.column(level, name).expect("a column").map(Number::bits).collect()
}

fn real(values: impl IntoIterator<Item = f64>) -> Vec<u64> {
    values.into_iter().map(f64::to_bits).collect()
}

#[test]
fn figures_are_those_of_the_analysis_for_any_size_and_any_threads() {
    let directory = tempfile::tempdir().expect("a directory");
    let small = write_adapter(
        &directory.path().join("small"),
        &[("layers.0.q", 24, 40), ("layers.0.k", 8, 40)],
        "",
    );
    let large = write_large(&directory.path().join("large"));
    let paths = [small, large];
    let pool = build_pool(Some(2)).expect("a pool");
    let options = analysis::Options { percentiles: vec![], bins: 10, entries: false };
    for threads in [1, 3] {
        let found = scanned(&paths, FULL, threads);
        for (position, path) in paths.iter().enumerate() {
            let found = found[&position].as_ref().expect("sound");
            let adapter = Adapter::open(path).expect("sound");
            let expected =
                analysis::analyze(&adapter, None, &options, &pool, &Task::new()).expect("sound");
            let record = &found.record;
            let columns = adapter_columns(FULL);
            let figure = |name: &str| {
                let place = columns.iter().position(|column| column.name == name);
                record.figures[place.expect("a column")]
            };
            for (name, theirs) in [
                ("mean", expected.weights.mean),
                ("std", expected.weights.std),
                ("l2_norm", expected.weights.l2_norm),
                ("skewness", expected.weights.skewness),
                ("kurtosis", expected.weights.kurtosis),
                ("max_spectral_norm", expected.summary.updates.max_spectral_norm),
                ("mean_effective_rank", expected.summary.updates.mean_effective_rank),
            ] {
                assert_eq!(figure(name), theirs.to_bits(), "{name}");
            }
            assert_eq!(found.non_finite.len(), position);
            let blake3 = blake3_of(adapter.file().path()).expect("read");
            assert_eq!(record.texts.blake3.as_deref(), Some(blake3.as_str()));
            let each = |value: fn(&analysis::ModuleAnalysis) -> f64| {
                real(expected.modules.iter().map(value))
            };
            assert_eq!(cells(record, FULL, "frobenius_norm"), each(|m| m.spectrum.frobenius_norm));
            assert_eq!(cells(record, FULL, "effective_rank"), each(|m| m.spectrum.effective_rank));
            assert_eq!(cells(record, FULL, "entry_mean"), each(|m| m.spectrum.entry_mean));
            assert_eq!(cells(record, FULL, "scaling"), each(|m| m.scaling));
            let of = |name: &str| {
                let tensor = expected.tensors.iter().find(|tensor| tensor.name == name);
                &tensor.expect("a tensor").statistics
            };
            let std = expected.modules.iter().map(|module| of(&module.b_name).std);
            assert_eq!(cells(record, FULL, "b_std"), real(std));
            let kurtosis = expected.modules.iter().map(|module| of(&module.a_name).kurtosis);
            assert_eq!(cells(record, FULL, "a_kurtosis"), real(kurtosis));
            let values: Vec<f64> =
                expected.modules.iter().flat_map(|m| m.spectrum.singular_values.clone()).collect();
            assert_eq!(record.modules.singular_values, values);
            assert_eq!(found.features, expected.features);
        }
    }
}

#[test]
fn each_level_has_its_columns() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = write_adapter(&directory.path().join("a"), &[("q", 24, 40), ("k", 8, 40)], "");
    for name in Level::NAMES {
        let level = Level::from_name(name).expect("a level");
        let found = scanned(std::slice::from_ref(&path), level, 2);
        let found = found[&0].as_ref().expect("sound");
        let (record, modules) = (&found.record, &found.record.modules);
        assert_eq!(modules.cells.len(), 2 * module_columns(level).len(), "{name}");
        assert_eq!(record.figures.len(), adapter_columns(level).len());
        assert_eq!(modules.singular_values.len(), if level.spectra { 4 } else { 0 });
        assert_eq!(record.texts.blake3.is_some(), level.reads_data());
        assert_eq!(cells(record, level, "in_features"), [40, 40]);
        assert!(record.column(level, "nothing").is_none());
    }
    assert!(Level::from_name("most").is_err());
}

#[test]
fn what_is_broken_does_not_keep_the_others_from_being_read() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut paths = Vec::new();
    for index in 0..40 {
        let path = directory.path().join(format!("{index}"));
        write_adapter(&path, &[("layers.0.q", 24, 40)], "");
        if index % 3 == 0 {
            let file = path.join("adapter_model.safetensors");
            let bytes = fs::read(&file).expect("read");
            fs::write(&file, &bytes[..bytes.len() - index]).expect("written");
        }
        paths.push(path);
    }
    paths.push(directory.path().join("nowhere"));
    let found = scanned(&paths, FULL, 3);
    assert_eq!(found.len(), 41);
    for (position, result) in found {
        let is_broken = (position % 3 == 0 && position > 0) || position == 40;
        assert_eq!(result.is_err(), is_broken, "{position}");
    }
}

fn opened(path: &Path) -> Open {
    let adapter = Adapter::open(path).expect("sound");
    Open::new(0, adapter, &source(path), FULL).expect("sound")
}

#[test]
fn digests_are_those_of_the_files() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut paths = Vec::new();
    for index in 0..7u64 {
        let path = directory.path().join(format!("{index}"));
        // Files of other lengths, one of them broken and one large.
        paths.push(match index {
            4 => write_large(&path),
            _ => write_adapter(&path, &[("layers.0.q", 24 + index, 40 * (index + 1))], ""),
        });
    }
    fs::write(paths[2].join("adapter_model.safetensors"), "nothing").expect("written");
    for threads in [1, 2, 5] {
        for count in 1..=paths.len() {
            let found = scanned(&paths[..count], FULL, threads);
            assert_eq!(found.len(), count);
            for (position, result) in found {
                if position == 2 {
                    result.expect_err("no safetensors file");
                    continue;
                }
                let expected = blake3_of(&paths[position].join("adapter_model.safetensors"));
                let found = result.expect("sound").record.texts.blake3.expect("data was read");
                assert_eq!(found, expected.expect("read"), "{position} of {count}");
            }
        }
    }
}

#[test]
fn a_file_that_changes_while_it_is_read_is_an_error() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = write_adapter(&directory.path().join("a"), &[("layers.0.q", 24, 40)], "");
    let file = path.join("adapter_model.safetensors");
    let bytes = fs::read(&file).expect("read");
    let (mut buffer, task) = (Vec::new(), Task::new());

    let shrinking = opened(&path);
    fs::write(&file, &bytes[..bytes.len() - 100]).expect("written");
    let whole = shrinking.measure_whole(&mut buffer, &task).expect_err("too short");
    assert!(whole.to_string().contains("changed while it was read"), "{whole}");
    for unit in [Unit::Digest, Unit::Module(0)] {
        shrinking.measure(unit, &mut buffer, &task).expect_err("too short");
    }

    fs::write(&file, &bytes).expect("written");
    let growing = opened(&path);
    fs::write(&file, [&bytes[..], &[0; 64]].concat()).expect("written");
    growing.measure_whole(&mut buffer, &task).expect("what was there is there");
    let error = growing.result().expect_err("another file");
    assert!(error.to_string().contains("changed while it was read"), "{error}");
}

#[test]
fn a_cancelled_scan_ends() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = write_adapter(&directory.path().join("a"), &[("layers.0.q", 24, 40)], "");
    let sources = vec![source(&path); 100];
    let pool = build_pool(Some(2)).expect("a pool");
    let task = Task::new();
    let delivered = Mutex::new(0);
    let result = scan(&sources, FULL, &pool, &task, &|_, _| {
        *delivered.lock().expect("sound") += 1;
        task.cancel();
    });
    assert!(matches!(result, Err(Error::Cancelled)));
    assert!(*delivered.lock().expect("sound") <= 2);
}

#[test]
fn a_record_comes_back_as_it_was_encoded() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = write_adapter(&directory.path().join("a"), &[("q", 24, 40), ("ä.0.k", 8, 40)], "");
    for name in Level::NAMES {
        let level = Level::from_name(name).expect("a level");
        let found = scanned(std::slice::from_ref(&path), level, 1);
        let record = &found[&0].as_ref().expect("sound").record;
        let (details, numbers) = record.encode();
        assert!(!details.contains('\n'));
        assert_eq!(&Record::decode(level, &details, &numbers).expect("one of ours"), record);
        // Nothing of another length, or of another level, is taken for one.
        for wrong in [&numbers[8..], &numbers[..numbers.len() - 8], &numbers[1..], &[]] {
            Record::decode(level, &details, wrong).expect_err("too short");
        }
        Record::decode(level, &details, &[&numbers[..], &[0; 8]].concat()).expect_err("too long");
        Record::decode(level, &details[1..], &numbers).expect_err("no JSON");
        let other = if name == "headers" { FULL } else { Level { moments: false, spectra: false } };
        Record::decode(other, &details, &numbers).expect_err("another level");
    }
}

#[test]
fn spectra_found_elsewhere_make_the_record_of_a_scan_that_finds_them() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = write_adapter(&directory.path().join("a"), &[("q", 24, 40), ("k", 8, 40)], "");
    let of = |level| {
        let found = scanned(std::slice::from_ref(&path), level, 1).remove(&0);
        found.expect("delivered").expect("sound").record
    };
    let moments = Level { moments: true, spectra: false };
    let adapter = Adapter::open(&path).expect("sound");
    let options = analysis::Options { percentiles: vec![], bins: 10, entries: false };
    let pool = build_pool(Some(1)).expect("a pool");
    let analysis = analysis::analyze(&adapter, None, &options, &pool, &Task::new()).expect("sound");
    let spectra: Vec<_> = analysis.modules.into_iter().map(|module| module.spectrum).collect();
    for level in [FULL, Level { moments: false, spectra: true }] {
        let made = of(moments).with_spectra(moments, level, &spectra).expect("one for each");
        assert_eq!(made, of(level));
    }
    of(moments).with_spectra(moments, FULL, &spectra[1..]).expect_err("one is missing");
}
