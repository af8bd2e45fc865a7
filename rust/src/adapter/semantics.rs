//! What an adapter's factors mean beyond their numbers: how they began, which layers are repeated,
//! what was trained as one.

use crate::checkpoint::heads::Task;

/// What the initialization took out of the base's weight and put into the factors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Initialization {
    /// Nothing: the factors began with a product of zero.
    #[default]
    Plain,
    /// The r largest singular components (PiSSA; Meng et al. 2024, arXiv:2404.02948).
    Largest {
        /// Whether by a randomized method, so that nobody can repeat it exactly.
        randomized: bool,
    },
    /// The r smallest singular components (KaSA; Wang et al. 2024, arXiv:2412.06071).
    Smallest,
    /// s times the product of the first r columns and rows of a QR decomposition (OLoRA;
    /// Büyükakyüz 2024, arXiv:2406.01775).
    Leading,
    /// Something that is not known, and that the caller allowed by name.
    Unknown,
}

impl Initialization {
    /// Whether a merge of an update with the scale s takes something out of the base's weight, too. Of
    /// what is not known it does not.
    pub fn takes_out(self, scale: f64) -> bool {
        match self {
            Self::Plain | Self::Unknown => false,
            Self::Largest { .. } | Self::Smallest => true,
            Self::Leading => scale != 0.0,
        }
    }
}

/// How experts' factors lie where their shapes do not tell, by the model that was trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransposedExperts {
    /// As (in, out) in every model.
    Always,
    /// As (in, out) but in the models that take their experts so.
    UnlessStoredTransposed,
    /// As (in, out) in the models that take their experts so, and in no other.
    IfStoredTransposed,
}

/// What an adapter's factors mean. The default is that of a format that says nothing of it.
#[derive(Debug, Clone, Default)]
pub struct Semantics {
    /// Whether its scales are not its own, but what was given or left open, as its config is not there.
    pub scale_is_given: bool,
    /// How the factors began.
    pub initialization: Initialization,
    /// The layers of the base that make up the model, as ranges without their ends.
    pub layer_replication: Option<Vec<(u64, u64)>>,
    /// Whether the modules that share the input embeddings were trained as one.
    pub ties_weights: bool,
    /// A hint, and no more, that weights are stored (in, out).
    pub stored_transposed: bool,
    /// How experts' factors lie, where the adapter tells.
    pub transposed_experts: Option<TransposedExperts>,
    /// Whether its settings name s itself, and no alpha.
    pub names_scale: bool,
    /// Whether s is α/√r instead of α/r (Kalajdzievski 2023, arXiv:2312.03732).
    pub rank_stabilized: bool,
    /// In which order the rows of some products are, in words, where it is not the weights' and
    /// nothing tells how to undo it.
    pub unknown_order: Option<String>,
    /// What it was trained for.
    pub task: Option<Task>,
    /// The base that was trained, by the name that the adapter gives it.
    pub base: Option<String>,
}
