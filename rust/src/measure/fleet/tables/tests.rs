use arrow_array::Array;
use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int32Type, Int64Type};

use super::super::record::{Counts, Modules, Texts};
use super::*;
use crate::measure::metrics::Shape;
use crate::measure::spectrum::Spectrum;

const SPECTRA: Level = Level { moments: false, spectra: true };

/// An adapter with modules of so many singular values each, of which the first is the rank.
fn record(paths: &[&str], lengths: &[usize]) -> Record {
    let mut modules = Modules::default();
    let (mut shapes, mut spectra) = (Vec::new(), Vec::new());
    for (path, &rank) in paths.iter().zip(lengths) {
        let shape = Shape { rows: 30, columns: 20, rank, alpha: 8.0, scaling: 0.5 };
        let values = (0..rank).map(|index| (rank - index) as f64).collect();
        let spectrum = Spectrum::from_values(30, 20, values, 0.25);
        modules.push(path, "linear", &shape, None, Some(&spectrum));
        shapes.push(shape);
        spectra.push(spectrum);
    }
    let texts = Texts { base: paths.first().map(|path| (*path).into()), ..Texts::default() };
    let counts = Counts { tensors: 2 * paths.len(), parameters: 7, bytes: 9 };
    let spectra: Vec<_> = spectra.iter().collect();
    Record::new(texts, counts, modules, &shapes, None, Some(&spectra))
}

fn finding(severity: &str, kind: &str, module: Option<&str>) -> Finding {
    Finding {
        severity: severity.into(),
        kind: kind.into(),
        module: module.map(Into::into),
        figure: 2.5,
        count: 3,
        reason: format!("{kind} of {module:?}"),
    }
}

fn texts(batch: &RecordBatch, name: &str) -> Vec<Option<String>> {
    let array = batch.column_by_name(name).expect("a column");
    let plain = |texts: &StringArray| texts.iter().map(|text| text.map(str::to_owned)).collect();
    match array.as_dictionary_opt::<Int32Type>() {
        None => plain(array.as_string()),
        Some(coded) => {
            let values: Vec<Option<String>> = plain(coded.values().as_string());
            coded
                .keys()
                .iter()
                .map(|key| key.and_then(|key| values[key as usize].clone()))
                .collect()
        }
    }
}

fn some(texts: &[&str]) -> Vec<Option<String>> {
    texts.iter().map(|text| Some((*text).to_owned())).collect()
}

fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

#[test]
fn adapters_come_in_the_order_of_their_positions_whatever_that_of_their_coming() {
    let mut tables = Tables::new(SPECTRA, 7);
    let late = record(&["layers.1.q", "head"], &[3, 1]);
    let early = record(&["layers.0.ä"], &[2]);
    tables.add(9, &late, vec![finding("note", "b", None), finding("note", "a", None)]).expect("ok");
    tables.add(4, &record(&[], &[]), vec![]).expect("ok");
    let severe = finding("critical", "a", Some("layers.0.ä"));
    tables.add(2, &early, vec![severe.clone(), finding("note", "a", None)]).expect("ok");
    assert_eq!(tables.positions(), [2, 4, 9]);

    tables.finish(&owned(&["p"]), &owned(&["n"])).expect_err("one path of three adapters");
    let names = owned(&["x", "y", "z"]);
    let (adapters, modules) = tables.finish(&owned(&["a/x", "a/y", "a/z"]), &names).expect("ok");
    assert_eq!(adapters.schema().metadata().get("lorafast.schema_version"), Some(&"7".to_owned()));
    assert_eq!(texts(&adapters, "path"), some(&["a/x", "a/y", "a/z"]));
    let base = [Some("layers.0.ä".to_owned()), None, Some("layers.1.q".to_owned())];
    assert_eq!(texts(&adapters, "base"), base);
    let integers = |batch: &RecordBatch, name: &str| -> Vec<i64> {
        let column = batch.column_by_name(name).expect("a column");
        column.as_primitive::<Int64Type>().values().to_vec()
    };
    assert_eq!(integers(&adapters, "rank"), [2, -1, 3]);
    assert_eq!(integers(&adapters, "modules"), [1, 0, 2]);
    assert_eq!(integers(&adapters, "severe"), [3, 0, 0]);
    assert_eq!(integers(&adapters, "notes"), [3, 0, 6]);
    let kinds = adapters.column_by_name("findings").expect("a column").as_list::<i64>();
    let of = |row| {
        let list = kinds.value(row);
        list.as_string::<i32>().iter().flatten().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!([of(0), of(1), of(2)], [owned(&["a"]), vec![], owned(&["b", "a"])]);

    assert_eq!(texts(&modules, "adapter"), some(&["x", "z", "z"]));
    assert_eq!(texts(&modules, "module"), some(&["layers.0.ä", "layers.1.q", "head"]));
    assert_eq!(texts(&modules, "layer"), some(&["ä", "q", "head"]));
    let blocks = modules.column_by_name("block").expect("a column");
    assert_eq!(integers(&modules, "block"), [0, 1, -1]);
    assert!(blocks.is_valid(1) && blocks.is_null(2));
    assert_eq!(integers(&modules, "rank"), [2, 3, 1]);
    let values = modules.column_by_name("singular_values").expect("a column").as_list::<i64>();
    let of = |row| values.value(row).as_primitive::<Float64Type>().values().to_vec();
    assert_eq!([of(0), of(1), of(2)], [vec![2.0, 1.0], vec![3.0, 2.0, 1.0], vec![1.0]]);

    let of_fleet =
        vec![(None, finding("critical", "c", None)), (Some(1), finding("note", "d", None))];
    let names = Arc::new(StringArray::from_iter_values(&names));
    let findings = tables.findings(of_fleet, names).expect("ok");
    assert_eq!(
        texts(&findings, "severity"),
        some(&["critical", "critical", "note", "note", "note", "note"])
    );
    assert_eq!(texts(&findings, "kind"), some(&["a", "c", "a", "b", "a", "d"]));
    let adapters = texts(&findings, "adapter");
    assert_eq!(adapters[1], None);
    assert_eq!(adapters[2..], some(&["x", "z", "z", "y"]));
    assert_eq!(texts(&findings, "module")[0].as_deref(), Some("layers.0.ä"));
    assert_eq!(texts(&findings, "module")[1], None);
    assert_eq!(texts(&findings, "reason")[0], Some(severe.reason));
}

#[test]
fn errors_come_in_the_order_of_what_they_are_about() {
    let mut tables = Tables::new(SPECTRA, 1);
    for (position, path) in [(Some(5), "b"), (None, "none"), (Some(1), "a")] {
        tables.add_error(position, path.into(), format!("why {path}"));
    }
    let errors = tables.errors().expect("ok");
    assert_eq!(texts(&errors, "path"), some(&["none", "a", "b"]));
    assert_eq!(texts(&errors, "reason"), some(&["why none", "why a", "why b"]));
}

#[test]
fn nothing_makes_tables_without_rows() {
    let mut tables = Tables::new(SPECTRA, 1);
    tables.add(0, &record(&[], &[]), vec![finding("grave", "a", None)]).expect_err("no severity");
    let mut tables = Tables::new(SPECTRA, 1);
    let (adapters, modules) = tables.finish(&[], &[]).expect("ok");
    assert_eq!((adapters.num_rows(), modules.num_rows()), (0, 0));
    let names = Arc::new(StringArray::new_null(0));
    assert_eq!(tables.findings(vec![], names).expect("ok").num_rows(), 0);
    assert_eq!(tables.errors().expect("ok").num_rows(), 0);
}
