//! What a fleet's tables hold of one adapter, and how a cache keeps it.

use serde::{Deserialize, Serialize};

use super::Level;
use crate::measure::metrics::{
    ALL_VALUES, Metric, Number, SHAPE, SPECTRUM, Shape, UPDATES, VALUES,
};
use crate::measure::spectrum::Spectrum;
use crate::measure::statistics::Summary;
use crate::measure::summary::{UpdateSummary, most_common};

/// Stands for an integer that is not there.
pub const NOTHING: i64 = -1;
/// The column of a module's row that counts its singular values, which stand beside the rows.
const COUNT: &str = "singular_values";

/// A column of numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Whether it holds i64 and not f64.
    pub is_integer: bool,
}

impl Column {
    fn new(name: impl Into<String>, is_integer: bool) -> Self {
        Self { name: name.into(), is_integer }
    }

    fn of<T>(prefix: &'static str, metrics: &'static [Metric<T>]) -> impl Iterator<Item = Self> {
        let name = move |metric: &Metric<T>| format!("{prefix}{}", metric.name);
        metrics.iter().map(move |metric| Self::new(name(metric), metric.is_integer()))
    }
}

/// The numbers of a module's row at a level, in their order.
pub fn module_columns(level: Level) -> Vec<Column> {
    let mut columns: Vec<_> = Column::of("", &SHAPE).collect();
    if level.moments {
        columns.extend(Column::of("a_", &VALUES));
        columns.extend(Column::of("b_", &VALUES));
    }
    if level.spectra {
        columns.extend(Column::of("", &SPECTRUM));
        columns.push(Column::new(COUNT, true));
    }
    columns
}

/// The numbers of an adapter's row at a level, in their order.
pub fn adapter_columns(level: Level) -> Vec<Column> {
    let mut columns = vec![
        Column::new("rank", true),
        Column::new("alpha", false),
        Column::new("scaling", false),
        Column::new("modules", true),
        Column::new("tensors", true),
        Column::new("parameters", true),
        Column::new("bytes", true),
    ];
    if level.moments {
        columns.extend(Column::of("", &VALUES));
        columns.extend(Column::of("", &ALL_VALUES));
    }
    if level.spectra {
        columns.extend(Column::of("", &UPDATES));
    }
    columns
}

/// What an adapter's config and file say in words.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Texts {
    /// `peft_type` of its config.
    pub peft_type: Option<String>,
    /// `base_model_name_or_path` of its config.
    pub base: Option<String>,
    /// How its scales follow from alpha and rank.
    pub scaling_rule: String,
    /// The types of its tensors, sorted.
    pub dtypes: String,
    /// BLAKE3 of the weights file, where more than headers was read.
    pub blake3: Option<String>,
}

/// The modules of one adapter as rows, in the order of the file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Modules {
    /// The module's path of each row.
    pub paths: Vec<String>,
    /// linear, embedding or convolution.
    pub kinds: Vec<String>,
    /// The numbers, row after row, as [`module_columns`] lists them: the bits of i64 and f64.
    pub cells: Vec<u64>,
    /// The singular values of all rows, one row after the other.
    pub singular_values: Vec<f64>,
}

impl Modules {
    /// Appends a row, of the factors A and B and the update as far as they were measured.
    pub fn push(
        &mut self,
        path: &str,
        kind: &str,
        shape: &Shape,
        moments: Option<[&Summary; 2]>,
        spectrum: Option<&Spectrum>,
    ) {
        self.paths.push(path.to_owned());
        self.kinds.push(kind.to_owned());
        self.cells.extend(SHAPE.iter().map(|metric| metric.of(shape).bits()));
        for summary in moments.into_iter().flatten() {
            self.cells.extend(VALUES.iter().map(|metric| metric.of(summary).bits()));
        }
        if let Some(spectrum) = spectrum {
            self.push_spectrum(spectrum);
        }
    }

    fn push_spectrum(&mut self, spectrum: &Spectrum) {
        let values = &spectrum.singular_values;
        self.cells.extend(SPECTRUM.iter().map(|metric| metric.of(spectrum).bits()));
        self.cells.push(values.len() as u64);
        self.singular_values.extend(values);
    }
}

/// What was counted in an adapter's file.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    /// Its tensors.
    pub tensors: usize,
    /// The values in them.
    pub parameters: u64,
    /// Bytes of the file.
    pub bytes: u64,
}

/// One adapter in the tables.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// What is said in words.
    pub texts: Texts,
    /// Its numbers as [`adapter_columns`] lists them.
    pub figures: Vec<u64>,
    /// Its modules.
    pub modules: Modules,
}

impl Record {
    /// An adapter whose modules have these shapes and, where they were found, spectra.
    pub fn new(
        texts: Texts,
        counts: Counts,
        modules: Modules,
        shapes: &[Shape],
        values: Option<&Summary>,
        spectra: Option<&[&Spectrum]>,
    ) -> Self {
        let most = |value: fn(&Shape) -> f64| most_common(shapes.iter().map(value));
        let rank = most(|shape| shape.rank as f64).map_or(NOTHING, |rank| rank as i64);
        let integer = |value: u64| Number::Integer(value.cast_signed());
        let figures = [
            Number::Integer(rank),
            Number::Real(most(|shape| shape.alpha).unwrap_or(f64::NAN)),
            Number::Real(most(|shape| shape.scaling).unwrap_or(f64::NAN)),
            integer(shapes.len() as u64),
            integer(counts.tensors as u64),
            integer(counts.parameters),
            integer(counts.bytes),
        ];
        let mut record =
            Self { texts, figures: figures.into_iter().map(Number::bits).collect(), modules };
        if let Some(values) = values {
            let all = VALUES.iter().chain(&ALL_VALUES);
            record.figures.extend(all.map(|metric| metric.of(values).bits()));
        }
        if let Some(spectra) = spectra {
            record.push_updates(spectra);
        }
        record
    }

    fn push_updates(&mut self, spectra: &[&Spectrum]) {
        let updates = UpdateSummary::of(spectra.iter().copied());
        self.figures.extend(UPDATES.iter().map(|metric| metric.of(&updates).bits()));
    }

    /// The cells of one of the modules' columns, if this level has it.
    pub fn column(&self, level: Level, name: &str) -> Option<impl Iterator<Item = Number> + '_> {
        let columns = module_columns(level);
        let place = columns.iter().position(|column| column.name == name)?;
        let is_integer = columns[place].is_integer;
        Some(self.modules.cells.iter().skip(place).step_by(columns.len()).map(move |bits| {
            if is_integer {
                Number::Integer(bits.cast_signed())
            } else {
                Number::Real(f64::from_bits(*bits))
            }
        }))
    }

    /// The record of another level, with spectra that were found elsewhere: one for each module.
    ///
    /// # Errors
    /// What is wrong with the spectra, in words.
    pub fn with_spectra(
        &self,
        from: Level,
        to: Level,
        spectra: &[Spectrum],
    ) -> Result<Self, String> {
        let modules = &self.modules;
        if from.spectra || spectra.len() != modules.paths.len() {
            return Err(format!("{} spectra of {} modules", spectra.len(), modules.paths.len()));
        }
        let spectra: Vec<_> = spectra.iter().collect();
        let without = Level { spectra: false, ..to };
        let (have, kept) = (module_columns(from).len(), module_columns(without).len());
        let mut made = Self {
            texts: self.texts.clone(),
            figures: self.figures[..adapter_columns(without).len()].to_vec(),
            modules: Modules {
                paths: modules.paths.clone(),
                kinds: modules.kinds.clone(),
                ..Modules::default()
            },
        };
        for (cells, spectrum) in modules.cells.chunks_exact(have).zip(&spectra) {
            made.modules.cells.extend(&cells[..kept]);
            made.modules.push_spectrum(spectrum);
        }
        made.push_updates(&spectra);
        Ok(made)
    }

    /// The record as a line of JSON and as numbers of eight bytes: those of the adapter, of the
    /// modules, and the singular values.
    pub fn encode(&self) -> (String, Vec<u8>) {
        let Modules { paths, kinds, cells, singular_values } = &self.modules;
        let details = (&self.texts, paths, kinds);
        let details = serde_json::to_string(&details).expect("texts can be written");
        let numbers = [
            bytemuck::cast_slice(&self.figures),
            bytemuck::cast_slice(cells),
            bytemuck::cast_slice(singular_values),
        ];
        (details, numbers.concat())
    }

    /// The record that was encoded so.
    ///
    /// # Errors
    /// What is wrong, in words: it is none of this level's.
    pub fn decode(level: Level, details: &str, numbers: &[u8]) -> Result<Self, String> {
        let (texts, paths, kinds): (Texts, Vec<String>, Vec<String>) =
            serde_json::from_str(details).map_err(|error| error.to_string())?;
        let (numbers, rest) = numbers.as_chunks::<8>();
        let own = adapter_columns(level).len();
        let columns = module_columns(level);
        let rows = paths.len().checked_mul(columns.len());
        let end = rows.and_then(|rows| rows.checked_add(own)).unwrap_or(usize::MAX);
        if paths.len() != kinds.len() || !rest.is_empty() || numbers.len() < end {
            return Err("a record has too few numbers".into());
        }
        let bits = |numbers: &[[u8; 8]]| -> Vec<u64> {
            numbers.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect()
        };
        let modules = Modules {
            paths,
            kinds,
            cells: bits(&numbers[own..end]),
            singular_values: bits(&numbers[end..]).into_iter().map(f64::from_bits).collect(),
        };
        let record = Self { texts, figures: bits(&numbers[..own]), modules };
        let values = record.modules.singular_values.len();
        if record.lengths(level).try_fold(0usize, usize::checked_add) != Some(values) {
            return Err("a record has other singular values than it counts".into());
        }
        Ok(record)
    }

    /// How many singular values each module has.
    pub fn lengths(&self, level: Level) -> impl Iterator<Item = usize> {
        // It is the last column.
        let width = module_columns(level).len();
        let rows = self.modules.cells.chunks_exact(width).filter(move |_| level.spectra);
        rows.map(move |cells| cells[width - 1] as usize)
    }
}
