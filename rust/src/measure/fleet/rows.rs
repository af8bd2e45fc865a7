//! A module's figures as a row of numbers.

use serde::Serialize;

use super::Level;
use crate::adapter::Module;
use crate::measure::spectrum::Spectrum;
use crate::measure::statistics::Summary;

/// What the eight bytes of a cell are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// An i64.
    Integer,
    /// An f64.
    Real,
}

/// A column of the modules' table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Column {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
}

const fn integer(name: &'static str) -> Column {
    Column { name, kind: Kind::Integer }
}

const fn real(name: &'static str) -> Column {
    Column { name, kind: Kind::Real }
}

const SHAPE: [Column; 5] = [
    integer("out_features"),
    integer("in_features"),
    integer("rank"),
    real("alpha"),
    real("scaling"),
];

const MOMENTS: [Column; 16] = [
    real("a_mean"),
    real("a_std"),
    real("a_min"),
    real("a_max"),
    real("a_l2_norm"),
    real("a_skewness"),
    real("a_kurtosis"),
    real("a_zero_share"),
    real("b_mean"),
    real("b_std"),
    real("b_min"),
    real("b_max"),
    real("b_l2_norm"),
    real("b_skewness"),
    real("b_kurtosis"),
    real("b_zero_share"),
];

const SPECTRUM: [Column; 13] = [
    real("frobenius_norm"),
    real("spectral_norm"),
    real("stable_rank"),
    real("effective_rank"),
    real("energy_effective_rank"),
    real("participation_ratio"),
    integer("k90"),
    integer("k95"),
    integer("k99"),
    integer("numerical_rank"),
    real("condition"),
    real("entry_mean"),
    integer("singular_values"),
];

/// The columns of the modules' table at a level, in the order of a row's cells.
pub fn columns(level: Level) -> Vec<Column> {
    let mut columns = SHAPE.to_vec();
    if level.moments {
        columns.extend(MOMENTS);
    }
    if level.spectra {
        columns.extend(SPECTRUM);
    }
    columns
}

/// What a row is made of.
pub struct Row<'a> {
    pub module: &'a Module,
    pub rows: usize,
    pub columns: usize,
    /// Of A and of B.
    pub moments: Option<&'a [Summary; 2]>,
    pub spectrum: Option<&'a Spectrum>,
}

#[derive(Clone, Copy)]
enum Cell {
    Integer(i64),
    Real(f64),
}

impl From<usize> for Cell {
    fn from(value: usize) -> Self {
        // Extents and counts of tensors in memory never come near 2⁶³.
        Self::Integer(value as i64)
    }
}

impl From<f64> for Cell {
    fn from(value: f64) -> Self {
        Self::Real(value)
    }
}

impl Row<'_> {
    /// Appends the row's cells.
    pub fn encode(&self, output: &mut Vec<u8>) {
        append(&SHAPE, self.shape(), output);
        if let Some([a, b]) = self.moments {
            let [a, b] = [a, b].map(moments);
            let mut cells = [Cell::Real(0.0); MOMENTS.len()];
            cells[..a.len()].copy_from_slice(&a);
            cells[a.len()..].copy_from_slice(&b);
            append(&MOMENTS, cells, output);
        }
        if let Some(spectrum) = self.spectrum {
            append(&SPECTRUM, figures(spectrum), output);
        }
    }

    fn shape(&self) -> [Cell; SHAPE.len()] {
        let Module { rank, alpha, scaling, .. } = self.module;
        [
            self.rows.into(),
            self.columns.into(),
            (*rank as usize).into(),
            (*alpha).into(),
            (*scaling).into(),
        ]
    }
}

fn moments(summary: &Summary) -> [Cell; MOMENTS.len() / 2] {
    [
        summary.mean.into(),
        summary.std.into(),
        summary.min.into(),
        summary.max.into(),
        summary.l2_norm.into(),
        summary.skewness.into(),
        summary.kurtosis.into(),
        summary.zero_share.into(),
    ]
}

fn figures(spectrum: &Spectrum) -> [Cell; SPECTRUM.len()] {
    [
        spectrum.frobenius_norm.into(),
        spectrum.spectral_norm.into(),
        spectrum.stable_rank.into(),
        spectrum.effective_rank.into(),
        spectrum.energy_effective_rank.into(),
        spectrum.participation_ratio.into(),
        spectrum.k90.into(),
        spectrum.k95.into(),
        spectrum.k99.into(),
        spectrum.numerical_rank.into(),
        spectrum.condition_number.into(),
        spectrum.entry_mean.into(),
        spectrum.singular_values.len().into(),
    ]
}

fn append<const N: usize>(columns: &[Column; N], cells: [Cell; N], output: &mut Vec<u8>) {
    for (column, cell) in columns.iter().zip(cells) {
        match cell {
            Cell::Integer(value) => {
                debug_assert_eq!(column.kind, Kind::Integer, "{}", column.name);
                output.extend(value.to_le_bytes());
            }
            Cell::Real(value) => {
                debug_assert_eq!(column.kind, Kind::Real, "{}", column.name);
                output.extend(value.to_le_bytes());
            }
        }
    }
}
