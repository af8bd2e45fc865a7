//! What became of a computation with adapters: plain data.

use std::path::PathBuf;

use indexmap::IndexMap;
use serde::Serialize;

/// What became of one module.
#[derive(Debug, Clone, Serialize)]
pub struct Record {
    /// (outputs, inputs).
    pub shape: [usize; 2],
    /// The rank of what went in, that of all adapters together.
    pub source_rank: usize,
    /// The rank that was written; 0 where the module was left out.
    pub rank: usize,
    /// Σ_{≤k}σ²/Σσ², the share of the energy that is kept.
    pub kept: f64,
    /// ‖ΔW − written‖/‖ΔW‖, of the factors as they were rounded.
    pub error: f64,
    /// ‖ΔW‖.
    pub norm: f64,
    /// σ of ΔW, descending; empty where nothing asked for them.
    pub singular_values: Vec<f64>,
    /// What each adapter's update was multiplied by, where the result is a sum of them.
    pub coefficients: Option<Vec<f64>>,
    /// Of a parameter that holds a matrix for each expert, the ranks that these need; all are written with
    /// the largest.
    pub expert_ranks: Option<Vec<usize>>,
}

/// How well a budget was spent.
#[derive(Debug, Clone, Serialize)]
pub struct BudgetReport {
    /// What it counts.
    pub measure: &'static str,
    /// How much there was.
    pub amount: u64,
    /// How much was spent.
    pub spent: u64,
    /// By how much the Σσ² that is kept can at most fall short of the best choice's; 0 where this is it.
    pub gap: f64,
}

/// What became of all modules.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The name of the format that was written.
    pub target_format: String,
    /// The element type of the factors.
    pub dtype: String,
    /// The modules, by their paths.
    pub modules: IndexMap<String, Record>,
    /// ‖ΔW − written‖/‖ΔW‖ over all modules.
    pub error: f64,
    /// Of a budget.
    pub budget: Option<BudgetReport>,
    /// What was left out, in words.
    pub lost: Vec<String>,
    /// What a user would want to know besides.
    pub notes: Vec<String>,
    /// Bytes of all factors.
    pub bytes: u64,
    /// The files that were written; none of a rehearsal.
    pub files: Vec<PathBuf>,
}

/// √(Σ errorᵢ²‖ΔWᵢ‖²/Σ‖ΔWᵢ‖²).
pub(crate) fn overall<'a>(records: impl Iterator<Item = &'a Record>) -> f64 {
    let (mut error, mut norm) = (0.0, 0.0);
    for record in records {
        error += (record.error * record.norm).powi(2);
        norm += record.norm * record.norm;
    }
    if error == 0.0 { 0.0 } else { (error / norm).sqrt() }
}
