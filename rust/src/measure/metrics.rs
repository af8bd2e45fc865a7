//! The metrics of modules and adapters: one row for each, which analyses, tables and pages read.
//!
//! To add a metric, add its row here, and what it is computed from where that is missing.

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use crate::measure::spectrum::Spectrum;
use crate::measure::statistics::Summary;
use crate::measure::summary::UpdateSummary;

/// A number of a `T`.
pub struct Metric<T: 'static> {
    /// Its name: of a field of an analysis, and of a column.
    pub name: &'static str,
    /// How it is written above a column of a page.
    pub symbol: &'static str,
    /// What it is counted in; empty of a number without a unit.
    pub unit: &'static str,
    /// What it is, in a few words.
    pub doc: &'static str,
    value: Value<T>,
}

enum Value<T: 'static> {
    Integer(fn(&T) -> usize),
    Real(fn(&T) -> f64),
}

/// The value of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Number {
    /// A count.
    Integer(i64),
    /// Any other.
    Real(f64),
}

impl Number {
    /// The eight bytes of it that a table's column holds.
    pub fn bits(self) -> u64 {
        match self {
            Self::Integer(value) => value.cast_unsigned(),
            Self::Real(value) => value.to_bits(),
        }
    }
}

impl<T> Metric<T> {
    const fn integer(
        name: &'static str,
        symbol: &'static str,
        unit: &'static str,
        doc: &'static str,
        value: fn(&T) -> usize,
    ) -> Self {
        Self { name, symbol, unit, doc, value: Value::Integer(value) }
    }

    const fn real(
        name: &'static str,
        symbol: &'static str,
        unit: &'static str,
        doc: &'static str,
        value: fn(&T) -> f64,
    ) -> Self {
        Self { name, symbol, unit, doc, value: Value::Real(value) }
    }

    /// Whether its values are integers.
    pub fn is_integer(&self) -> bool {
        matches!(self.value, Value::Integer(_))
    }

    /// Its value.
    pub fn of(&self, subject: &T) -> Number {
        match self.value {
            // Extents and counts of tensors in files never come near 2⁶³.
            Value::Integer(value) => Number::Integer(value(subject) as i64),
            Value::Real(value) => Number::Real(value(subject)),
        }
    }
}

/// What the factors' shapes and the config say of a module.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Rows of ΔW.
    pub rows: usize,
    /// Columns of ΔW.
    pub columns: usize,
    /// r.
    pub rank: usize,
    /// The alpha that the config gives the module.
    pub alpha: f64,
    /// s.
    pub scaling: f64,
}

/// Of a module's shape and scale.
pub const SHAPE: [Metric<Shape>; 5] = [
    Metric::integer("out_features", "rows", "", "rows of ΔW", |s| s.rows),
    Metric::integer(
        "in_features",
        "columns",
        "",
        "columns of ΔW; in-channels and kernel of a convolution are taken together",
        |s| s.columns,
    ),
    Metric::integer("rank", "r", "", "r, the common extent of the factors", |s| s.rank),
    Metric::real("alpha", "α", "", "the alpha that the config gives the module", |s| s.alpha),
    Metric::real("scaling", "s", "", "s: α/r, or α/√r for rsLoRA (Kalajdzievski 2023)", |s| {
        s.scaling
    }),
];

/// Of stored values: of each factor, and of all of an adapter's.
pub const VALUES: [Metric<Summary>; 8] = [
    Metric::real("mean", "mean", "", "the arithmetic mean", |s| s.mean),
    Metric::real("std", "std", "", "the population standard deviation (divisor n)", |s| s.std),
    Metric::real("min", "min", "", "the least value", |s| s.min),
    Metric::real("max", "max", "", "the greatest value", |s| s.max),
    Metric::real("l2_norm", "‖w‖", "", "√Σw²", |s| s.l2_norm),
    Metric::real("skewness", "skewness", "", "m₃/m₂^1.5, biased", |s| s.skewness),
    Metric::real("kurtosis", "kurtosis", "", "m₄/m₂² − 3, biased", |s| s.kurtosis),
    Metric::real("zero_share", "zeros", "share", "the share of zeros of the finite values", |s| {
        s.zero_share
    }),
];

/// Of all of an adapter's stored values, beside [`VALUES`].
pub const ALL_VALUES: [Metric<Summary>; 1] = [Metric::integer(
    "non_finite",
    "not finite",
    "values",
    "NaN and ±∞ among the values",
    |s| s.non_finite as usize,
)];

/// Of the singular values σ of a module's update ΔW.
pub const SPECTRUM: [Metric<Spectrum>; 12] = [
    Metric::real("frobenius_norm", "‖ΔW‖", "", "‖ΔW‖_F = √Σσ²", |s| {
        s.frobenius_norm
    }),
    Metric::real("spectral_norm", "σ₁", "", "‖ΔW‖₂ = σ₁", |s| s.spectral_norm),
    Metric::real("stable_rank", "stable rank", "directions", "Σσ²/σ₁²", |s| s.stable_rank),
    Metric::real(
        "effective_rank",
        "effective rank",
        "directions",
        "Roy and Vetterli: exp H(σ/Σσ), H the entropy",
        |s| s.effective_rank,
    ),
    Metric::real(
        "energy_effective_rank",
        "energy effective rank",
        "directions",
        "exp H(σ²/Σσ²), H the entropy",
        |s| s.energy_effective_rank,
    ),
    Metric::real(
        "participation_ratio",
        "participation ratio",
        "directions",
        "(Σσ²)²/Σσ⁴",
        |s| s.participation_ratio,
    ),
    Metric::integer(
        "k90",
        "k₉₀",
        "directions",
        "the least k for which the first k of σ² make 90 % of Σσ²",
        |s| s.k90,
    ),
    Metric::integer(
        "k95",
        "k₉₅",
        "directions",
        "the least k for which the first k of σ² make 95 % of Σσ²",
        |s| s.k95,
    ),
    Metric::integer(
        "k99",
        "k₉₉",
        "directions",
        "the least k for which the first k of σ² make 99 % of Σσ²",
        |s| s.k99,
    ),
    Metric::integer(
        "numerical_rank",
        "numerical rank",
        "directions",
        "σ above max(out, in)·ε·σ₁, as `numpy.linalg.matrix_rank` in float64",
        |s| s.numerical_rank,
    ),
    Metric::real("condition", "condition", "", "σ₁ over the last singular value", |s| {
        s.condition_number
    }),
    Metric::real("entry_mean", "entry mean", "", "the mean of ΔW's entries", |s| s.entry_mean),
];

/// Of all updates of an adapter.
pub const UPDATES: [Metric<UpdateSummary>; 4] = [
    Metric::real("frobenius_norm", "‖ΔW‖", "", "√Σ‖ΔW‖_F² of all modules", |s| {
        s.frobenius_norm
    }),
    Metric::real(
        "max_spectral_norm",
        "max σ₁",
        "",
        "the greatest ‖ΔW‖₂ of a module",
        |s| s.max_spectral_norm,
    ),
    Metric::real(
        "median_spectral_norm",
        "median σ₁",
        "",
        "the median of the modules' ‖ΔW‖₂",
        |s| s.median_spectral_norm,
    ),
    Metric::real(
        "mean_effective_rank",
        "mean effective rank",
        "directions",
        "the mean of the modules' effective rank",
        |s| s.mean_effective_rank,
    ),
];

/// A metric, for those who do not compute it.
#[derive(Debug, Clone, Serialize)]
pub struct Description {
    /// Its name.
    pub name: &'static str,
    /// How it is written above a column.
    pub symbol: &'static str,
    /// What it is counted in.
    pub unit: &'static str,
    /// What it is.
    pub doc: &'static str,
    /// Whether its values are integers.
    pub integer: bool,
}

impl<T> From<&Metric<T>> for Description {
    fn from(metric: &Metric<T>) -> Self {
        let Metric { name, symbol, unit, doc, .. } = *metric;
        Self { name, symbol, unit, doc, integer: metric.is_integer() }
    }
}

/// The metrics of a module's update, in the order in which they are told.
pub fn of_updates() -> Vec<Description> {
    SPECTRUM.iter().map(Description::from).collect()
}

/// A spectrum as a map of its metrics and its singular values.
///
/// # Errors
/// The serializer's.
pub fn serialize_spectrum<S: Serializer>(spectrum: &Spectrum, to: S) -> Result<S::Ok, S::Error> {
    let mut map = to.serialize_map(Some(SPECTRUM.len() + 1))?;
    for metric in &SPECTRUM {
        map.serialize_entry(metric.name, &metric.of(spectrum))?;
    }
    map.serialize_entry("singular_values", &spectrum.singular_values)?;
    map.end()
}
