//! The tables of a fleet as Arrow's record batches.
//!
//! Adapters are added in the order in which they are done, to columns that grow. When all are there,
//! one column after the other is brought into the order of the adapters' positions, so that memory
//! is that of the tables and of their largest column.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::hash::Hash;
use std::mem::take;
use std::ops::Range;
use std::sync::Arc;

use arrow_array::builder::{LargeListBuilder, StringBuilder};
use arrow_array::{
    ArrayRef, DictionaryArray, Float64Array, Int32Array, Int64Array, LargeListArray, RecordBatch,
    StringArray,
};
use arrow_buffer::{NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow_schema::{ArrowError, DataType, Field, Schema};

use super::Level;
use super::record::{Column, NOTHING, Record, adapter_columns, module_columns};
use crate::measure::places::places;

/// The severities of findings, the gravest first, with the adapters' columns that count them.
const SEVERITIES: [(&str, &str); 3] =
    [("critical", "severe"), ("warning", "warnings"), ("note", "notes")];

/// Something to look at.
#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    /// How bad it is.
    pub severity: String,
    /// What it is.
    pub kind: String,
    /// The module it is about; `None` of a whole adapter.
    pub module: Option<String>,
    /// The number that gave rise to it; NaN if there is none.
    pub figure: f64,
    /// Of how many modules it is.
    pub count: i64,
    /// One sentence.
    pub reason: String,
}

/// Different values, and the numbers that stand for them.
struct Interned<T> {
    codes: HashMap<T, i32>,
    values: Vec<T>,
}

impl<T> Default for Interned<T> {
    fn default() -> Self {
        Self { codes: HashMap::new(), values: Vec::new() }
    }
}

impl<T: Clone + Eq + Hash> Interned<T> {
    fn code(&mut self, value: T) -> i32 {
        *self.codes.entry(value).or_insert_with_key(|value| {
            self.values.push(value.clone());
            self.values.len() as i32 - 1
        })
    }
}

impl Interned<String> {
    fn array(&self) -> StringArray {
        StringArray::from_iter_values(&self.values)
    }
}

/// Findings in columns, each with the row of its adapter or its position.
#[derive(Default)]
struct Findings {
    adapters: Vec<Option<usize>>,
    severities: Vec<i32>,
    kinds: Vec<i32>,
    modules: Vec<Option<i32>>,
    figures: Vec<f64>,
    counts: Vec<i64>,
    reasons: Vec<i32>,
    kind_names: Interned<String>,
    module_names: Interned<String>,
    sentences: Interned<String>,
}

impl Findings {
    fn push(&mut self, adapter: Option<usize>, finding: Finding) -> Result<(), ArrowError> {
        let severity = SEVERITIES.iter().position(|(name, _)| *name == finding.severity);
        let Some(severity) = severity else {
            let text = format!("there is no severity {}", finding.severity);
            return Err(ArrowError::InvalidArgumentError(text));
        };
        self.adapters.push(adapter);
        self.severities.push(severity as i32);
        self.kinds.push(self.kind_names.code(finding.kind));
        self.modules.push(finding.module.map(|module| self.module_names.code(module)));
        self.figures.push(finding.figure);
        self.counts.push(finding.count);
        self.reasons.push(self.sentences.code(finding.reason));
        Ok(())
    }

    /// Positions of adapters become rows; the adapters of the rows are in order then.
    fn arrange(&mut self, rows: &HashMap<usize, usize>) {
        for adapter in &mut self.adapters {
            *adapter = adapter.and_then(|position| rows.get(&position).copied());
        }
        let mut order: Vec<usize> = (0..self.adapters.len()).collect();
        order.sort_by_key(|&place| self.adapters[place]);
        self.reorder(&order);
    }

    fn reorder(&mut self, order: &[usize]) {
        fn apply<T: Copy>(column: &mut Vec<T>, order: &[usize]) {
            *column = order.iter().map(|&place| column[place]).collect();
        }
        apply(&mut self.adapters, order);
        apply(&mut self.severities, order);
        apply(&mut self.kinds, order);
        apply(&mut self.modules, order);
        apply(&mut self.figures, order);
        apply(&mut self.counts, order);
        apply(&mut self.reasons, order);
    }

    /// How many of a severity each adapter has, modules counted one by one.
    fn counts(&self, severity: usize, rows: usize) -> Int64Array {
        let mut counts = vec![0; rows];
        for (place, adapter) in self.adapters.iter().enumerate() {
            if let Some(row) = *adapter
                && self.severities[place] == severity as i32
            {
                counts[row] += self.counts[place];
            }
        }
        counts.into()
    }

    /// The kinds that each adapter has, each once, in the order of its findings.
    fn kinds(&self, rows: usize) -> LargeListArray {
        let field = Field::new("item", DataType::Utf8, true);
        let mut lists = LargeListBuilder::new(StringBuilder::new()).with_field(field);
        let mut place = 0;
        for row in 0..rows {
            let first = place;
            while self.adapters.get(place) == Some(&Some(row)) {
                if !self.kinds[first..place].contains(&self.kinds[place]) {
                    let kind = &self.kind_names.values[self.kinds[place] as usize];
                    lists.values().append_value(kind);
                }
                place += 1;
            }
            lists.append(true);
        }
        lists.finish()
    }
}

/// The modules of some adapters: their paths and kinds. Most adapters of a fleet have the same.
type Layout = (Vec<String>, Vec<String>);

/// A fleet whose adapters are still being read.
pub struct Tables {
    level: Level,
    metadata: HashMap<String, String>,
    /// For each adapter, in the order in which they came, its position among all that are read.
    positions: Vec<usize>,
    texts: [Vec<Option<i32>>; 5],
    words: [Interned<String>; 5],
    /// Columns of the bits of numbers.
    figures: Vec<Vec<u64>>,
    cells: Vec<Vec<u64>>,
    layouts: Interned<Layout>,
    own_layouts: Vec<i32>,
    /// Where the rows and the singular values of each adapter end.
    row_ends: Vec<usize>,
    value_ends: Vec<usize>,
    singular_values: Vec<f64>,
    findings: Findings,
    errors: Vec<(Option<usize>, String, String)>,
}

/// The texts of an adapter, in the order of `Tables::texts`.
const TEXTS: [&str; 5] = ["peft_type", "base", "scaling_rule", "dtypes", "blake3"];
/// The numbers before which a text stands among the columns.
const BEFORE: [(&str, &str); 3] =
    [("peft_type", "rank"), ("base", "rank"), ("scaling_rule", "modules")];

impl Tables {
    /// A fleet without adapters; the tables say the version of their columns.
    pub fn new(level: Level, schema_version: u32) -> Self {
        let version = ("lorafast.schema_version".into(), schema_version.to_string());
        Self {
            level,
            metadata: HashMap::from([version]),
            positions: Vec::new(),
            texts: Default::default(),
            words: Default::default(),
            figures: vec![Vec::new(); adapter_columns(level).len()],
            cells: vec![Vec::new(); module_columns(level).len()],
            layouts: Interned::default(),
            own_layouts: Vec::new(),
            row_ends: Vec::new(),
            value_ends: Vec::new(),
            singular_values: Vec::new(),
            findings: Findings::default(),
            errors: Vec::new(),
        }
    }

    /// How much is known of each adapter.
    pub fn level(&self) -> Level {
        self.level
    }

    /// The positions of the adapters that are there, ascending.
    pub fn positions(&self) -> Vec<usize> {
        let mut positions = self.positions.clone();
        positions.sort_unstable();
        positions
    }

    /// Adds an adapter with its findings, in any order of the positions.
    ///
    /// # Errors
    /// A finding has a severity that there is not.
    pub fn add(
        &mut self,
        position: usize,
        record: &Record,
        findings: Vec<Finding>,
    ) -> Result<(), ArrowError> {
        for finding in findings {
            self.findings.push(Some(position), finding)?;
        }
        let texts = &record.texts;
        let own = [
            texts.peft_type.as_ref(),
            texts.base.as_ref(),
            Some(&texts.scaling_rule),
            Some(&texts.dtypes),
            texts.blake3.as_ref(),
        ];
        for ((column, words), text) in self.texts.iter_mut().zip(&mut self.words).zip(own) {
            column.push(text.map(|text| words.code(text.clone())));
        }
        for (column, bits) in self.figures.iter_mut().zip(&record.figures) {
            column.push(*bits);
        }
        let width = self.cells.len();
        let modules = &record.modules;
        for (place, column) in self.cells.iter_mut().enumerate() {
            column.extend(modules.cells.iter().skip(place).step_by(width));
        }
        self.singular_values.extend(&modules.singular_values);
        let layout = (modules.paths.clone(), modules.kinds.clone());
        self.own_layouts.push(self.layouts.code(layout));
        self.row_ends.push(self.cells[0].len());
        self.value_ends.push(self.singular_values.len());
        self.positions.push(position);
        Ok(())
    }

    /// Adds what could not be read: an adapter, or something that is none.
    pub fn add_error(&mut self, position: Option<usize>, path: String, reason: String) {
        self.errors.push((position, path, reason));
    }

    /// The tables of adapters and of modules; no adapter can be added any more.
    ///
    /// # Errors
    /// There are not as many paths and names as adapters.
    pub fn finish(
        &mut self,
        paths: &[String],
        names: &[String],
    ) -> Result<(RecordBatch, RecordBatch), ArrowError> {
        let mut order: Vec<usize> = (0..self.positions.len()).collect();
        order.sort_by_key(|&place| self.positions[place]);
        if paths.len() != order.len() {
            let text = format!("{} paths of {} adapters", paths.len(), order.len());
            return Err(ArrowError::InvalidArgumentError(text));
        }
        let rows = order.iter().enumerate().map(|(row, &place)| (self.positions[place], row));
        self.findings.arrange(&rows.collect());
        let names: ArrayRef = Arc::new(StringArray::from_iter_values(names));
        let adapters = self.adapters(&order, paths, Arc::clone(&names))?;
        Ok((adapters, self.modules(&order, names)?))
    }

    fn adapters(
        &mut self,
        order: &[usize],
        paths: &[String],
        names: ArrayRef,
    ) -> Result<RecordBatch, ArrowError> {
        let each: Vec<_> = order.iter().map(|&place| place..place + 1).collect();
        let mut columns: Vec<(String, ArrayRef)> = vec![
            ("path".into(), Arc::new(StringArray::from_iter_values(paths))),
            ("name".into(), names),
        ];
        let mut texts = TEXTS.iter().zip(take(&mut self.texts)).zip(take(&mut self.words)).map(
            |((name, codes), words)| -> (&str, ArrayRef) {
                let text = |place: &usize| codes[*place].map(|code| &words.values[code as usize]);
                (*name, Arc::new(StringArray::from_iter(order.iter().map(text))))
            },
        );
        let mut texts: HashMap<&str, ArrayRef> = texts.by_ref().collect();
        for (column, bits) in adapter_columns(self.level).iter().zip(take(&mut self.figures)) {
            for (text, _) in BEFORE.iter().filter(|(_, next)| *next == column.name) {
                columns.extend(texts.remove(text).map(|array| ((*text).into(), array)));
            }
            columns.push((column.name.clone(), numbers(column, gathered(&bits, &each))));
            if column.name == "bytes" {
                for text in ["dtypes", "blake3"] {
                    columns.extend(texts.remove(text).map(|array| (text.into(), array)));
                }
            }
        }
        for (place, (_, column)) in SEVERITIES.iter().enumerate() {
            let counts = self.findings.counts(place, order.len());
            columns.push(((*column).into(), Arc::new(counts)));
        }
        columns.push(("findings".into(), Arc::new(self.findings.kinds(order.len()))));
        self.batch(columns)
    }

    fn modules(&mut self, order: &[usize], names: ArrayRef) -> Result<RecordBatch, ArrowError> {
        let ranges = |ends: &[usize]| -> Vec<Range<usize>> {
            let start = |place: usize| if place == 0 { 0 } else { ends[place - 1] };
            order.iter().map(|&place| start(place)..ends[place]).collect()
        };
        let rows = ranges(&self.row_ends);
        let total = self.row_ends.last().copied().unwrap_or(0);
        let mut adapters = Vec::with_capacity(total);
        for (row, range) in rows.iter().enumerate() {
            adapters.resize(adapters.len() + range.len(), row as i32);
        }
        let mut columns = vec![("adapter".into(), dictionary(adapters.into(), names)?)];
        columns.extend(self.place_columns(order, total)?);
        let described = module_columns(self.level);
        let mut counts = None;
        for (column, bits) in described.iter().zip(take(&mut self.cells)) {
            let cells = gathered(&bits, &rows);
            drop(bits);
            if column.name == "singular_values" {
                counts = Some(cells);
            } else {
                columns.push((column.name.clone(), numbers(column, cells)));
            }
        }
        if let Some(counts) = counts {
            let values = take(&mut self.singular_values);
            let values = gathered(&values, &ranges(&self.value_ends));
            let offsets = OffsetBuffer::from_lengths(counts.iter().map(|&count| count as usize));
            let field = Arc::new(Field::new("item", DataType::Float64, true));
            let values = Arc::new(Float64Array::from(values));
            let lists = LargeListArray::try_new(field, offsets, values, None)?;
            columns.push(("singular_values".into(), Arc::new(lists)));
        }
        self.batch(columns)
    }

    /// The columns that tell where each module lies in its model.
    fn place_columns(
        &mut self,
        order: &[usize],
        total: usize,
    ) -> Result<Vec<(String, ArrayRef)>, ArrowError> {
        let [mut names, mut layers, mut kind_names] = [(); 3].map(|()| Interned::default());
        let mut of_layouts = Vec::new();
        for (paths, kinds) in take(&mut self.layouts).values {
            let places = places(&paths);
            let own: Vec<_> = paths
                .into_iter()
                .zip(kinds)
                .zip(places)
                .map(|((path, kind), place)| {
                    let codes = [names.code(path), layers.code(place.layer), kind_names.code(kind)];
                    (codes, place.block)
                })
                .collect();
            of_layouts.push(own);
        }
        let mut codes = [(); 3].map(|()| Vec::with_capacity(total));
        let mut blocks = Vec::with_capacity(total);
        let mut is_inside = Vec::with_capacity(total);
        for &place in order {
            for (own, block) in &of_layouts[self.own_layouts[place] as usize] {
                for (column, code) in codes.iter_mut().zip(own) {
                    column.push(*code);
                }
                // Also where there is none the value says so, for those who look at values alone.
                blocks.push(block.unwrap_or(NOTHING));
                is_inside.push(block.is_some());
            }
        }
        let [modules, own_layers, kinds] = codes;
        let block = Int64Array::try_new(blocks.into(), Some(NullBuffer::from(is_inside)))?;
        let coded = |codes: Vec<i32>, words: &Interned<String>| {
            dictionary(codes.into(), Arc::new(words.array()))
        };
        Ok(vec![
            ("module".into(), coded(modules, &names)?),
            ("block".into(), Arc::new(block)),
            ("layer".into(), coded(own_layers, &layers)?),
            ("kind".into(), coded(kinds, &kind_names)?),
        ])
    }

    /// The table of findings: the gravest first, otherwise by adapter, and those of the whole fleet
    /// after them.
    ///
    /// # Errors
    /// A finding has a severity that there is not.
    pub fn findings(
        &mut self,
        of_fleet: Vec<(Option<usize>, Finding)>,
        names: ArrayRef,
    ) -> Result<RecordBatch, ArrowError> {
        for (row, finding) in of_fleet {
            self.findings.push(row, finding)?;
        }
        let mut findings = take(&mut self.findings);
        let mut order: Vec<usize> = (0..findings.severities.len()).collect();
        order.sort_by_key(|&place| findings.severities[place]);
        findings.reorder(&order);
        let adapters = findings.adapters.iter().map(|row| row.map(|row| row as i32));
        let severities = StringArray::from_iter_values(SEVERITIES.map(|(name, _)| name));
        let sentences = &findings.sentences.values;
        let reasons = findings.reasons.iter().map(|code| &sentences[*code as usize]);
        let reasons = StringArray::from_iter_values(reasons);
        let modules = Int32Array::from(findings.modules);
        let (kinds, words) = (findings.kind_names.array(), findings.module_names.array());
        self.batch(vec![
            ("adapter".into(), dictionary(adapters.collect(), names)?),
            ("severity".into(), dictionary(findings.severities.into(), Arc::new(severities))?),
            ("kind".into(), dictionary(findings.kinds.into(), Arc::new(kinds))?),
            ("module".into(), dictionary(modules, Arc::new(words))?),
            ("figure".into(), Arc::new(Float64Array::from(findings.figures))),
            ("count".into(), Arc::new(Int64Array::from(findings.counts))),
            ("reason".into(), Arc::new(reasons)),
        ])
    }

    /// The table of errors: what is no adapter first, then by the adapters' positions.
    ///
    /// # Errors
    /// None that is known.
    pub fn errors(&mut self) -> Result<RecordBatch, ArrowError> {
        let mut errors = take(&mut self.errors);
        errors.sort_by_key(|(position, ..)| *position);
        let paths = StringArray::from_iter_values(errors.iter().map(|(_, path, _)| path));
        let reasons = StringArray::from_iter_values(errors.iter().map(|(.., reason)| reason));
        self.batch(vec![("path".into(), Arc::new(paths)), ("reason".into(), Arc::new(reasons))])
    }

    fn batch(&self, columns: Vec<(String, ArrayRef)>) -> Result<RecordBatch, ArrowError> {
        let field =
            |(name, array): &(String, ArrayRef)| Field::new(name, array.data_type().clone(), true);
        let fields: Vec<_> = columns.iter().map(field).collect();
        let schema = Schema::new_with_metadata(fields, self.metadata.clone());
        let arrays = columns.into_iter().map(|(_, array)| array).collect();
        RecordBatch::try_new(Arc::new(schema), arrays)
    }
}

/// Parts of a column, one behind the other.
fn gathered<T: Copy>(column: &[T], ranges: &[Range<usize>]) -> Vec<T> {
    let mut made = Vec::with_capacity(column.len());
    for range in ranges {
        made.extend_from_slice(&column[range.clone()]);
    }
    made
}

fn numbers(column: &Column, bits: Vec<u64>) -> ArrayRef {
    if column.is_integer {
        let values: Vec<i64> = bytemuck::cast_vec(bits);
        Arc::new(Int64Array::new(ScalarBuffer::from(values), None))
    } else {
        let values: Vec<f64> = bytemuck::cast_vec(bits);
        Arc::new(Float64Array::new(ScalarBuffer::from(values), None))
    }
}

fn dictionary(codes: Int32Array, values: ArrayRef) -> Result<ArrayRef, ArrowError> {
    Ok(Arc::new(DictionaryArray::try_new(codes, values)?))
}
