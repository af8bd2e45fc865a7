//! What an adapter says of its modules: their names and shapes, and how they may be read.

use indexmap::IndexMap;

use crate::adapter::{
    Adapter, Expert, Grammar, LayerKind, Module, Parameter, TransposedExperts, expert_factors,
};

/// The order in which experts' parameters are registered, which is the order of PEFT's wrappers.
const REGISTRATION: [&str; 4] = ["gate_up_proj", "gate_proj", "up_proj", "down_proj"];

/// One product of an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Part {
    /// Its module's key.
    pub key: String,
    /// Which of the products that its module holds.
    pub expert: Option<Expert>,
    /// What it is called in the adapter.
    pub name: String,
    /// The parameter that it changes, as far as names tell.
    pub(super) parameter: Option<String>,
    /// Whether that is a parameter of its expert's own.
    pub(super) is_of_one_expert: bool,
    /// (outputs, inputs) of its product.
    pub(super) shape: [u64; 2],
    /// Of an embedding, whether the outputs are its tokens; none for another layer.
    pub(super) is_by_tokens: Option<bool>,
}

/// The modules of an adapter as far as they are held against others'. Adapters with the same layout
/// are aligned alike.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Its products, in its own order.
    pub parts: Vec<Part>,
    /// The base's name, by which bases are told apart.
    pub(super) base: Option<String>,
    pub(super) is_flattened: bool,
    /// Whether the factors of experts make the transposed weight, where the adapter tells.
    pub(super) transposes_experts: Option<bool>,
    /// The layers of the base that make up the model.
    pub(super) replication: Option<Vec<(u64, u64)>>,
    /// In which order rows are, where it is not the weights'.
    pub(super) unknown_order: Option<String>,
}

impl Layout {
    /// Of an opened adapter.
    pub fn of(adapter: &Adapter) -> Self {
        let semantics = adapter.semantics();
        let parameters = parameters(adapter);
        let mut parts = Vec::new();
        for (key, module) in adapter.modules() {
            let parameter = parameters.get(key.as_str());
            // A parameter of experts is named by its wrappers, which its module's path leaves out.
            let title = module.title();
            let path: &str = if module.parameters.is_empty() { &title } else { key };
            for expert in module.products() {
                let name = match expert {
                    Some(Expert { index, .. }) => format!("{path}[{index}]"),
                    None => path.to_owned(),
                };
                let own = expert.and_then(|expert| parameter_of_expert(module, expert));
                let is_of_one_expert = own.is_some();
                let parameter = own.or_else(|| parameter.cloned());
                let shape = [module.outputs(), module.inputs()];
                let key = key.clone();
                let is_embedding = module.kind == LayerKind::Embedding;
                let is_by_tokens = is_embedding.then(|| module.delta.is_by_tokens());
                parts.push(Part {
                    key,
                    expert,
                    name,
                    parameter,
                    is_of_one_expert,
                    shape,
                    is_by_tokens,
                });
            }
        }
        Self {
            parts,
            base: semantics.base.as_deref().map(base_key),
            is_flattened: adapter.grammar() == Grammar::Flattened,
            transposes_experts: semantics.transposed_experts.map(|told| match told {
                // Those models that take their experts transposed have no other names for them.
                TransposedExperts::Always | TransposedExperts::UnlessStoredTransposed => true,
                TransposedExperts::IfStoredTransposed => false,
            }),
            replication: semantics.layer_replication.clone(),
            unknown_order: semantics.unknown_order.clone(),
        }
    }
}

/// What a base is known by: the last part of its name, whatever its case, so that a local copy is
/// taken for what it is a copy of.
pub fn base_key(base: &str) -> String {
    let trimmed = base.trim_end_matches(['/', '\\']);
    let last = trimmed.rsplit(['/', '\\']).next().unwrap_or(trimmed);
    last.to_lowercase()
}

/// The parameter of one expert, of a module that holds one matrix of each. What models have stacked
/// under the same name stays what it is, which may lie either way.
fn parameter_of_expert(module: &Module, expert: Expert) -> Option<String> {
    let own = module.only_parameter().filter(|own| own.name != "down_proj")?;
    let name = expert_factors::names_of_matrix(&own.name).first().copied()?;
    Some(format!("{}.{}.{name}.weight", module.path, expert.index))
}

/// The parameter that each module changes, by the module's key; none where nothing tells it.
fn parameters(adapter: &Adapter) -> IndexMap<&str, String> {
    let mut groups = IndexMap::<(&str, &str, Option<&str>), Vec<&Module>>::new();
    for module in adapter.modules().values() {
        let own = module.only_parameter().map(|parameter| parameter.name.as_str());
        groups.entry((&module.path, module.leaf(), own)).or_default().push(module);
    }
    let mut found = IndexMap::new();
    for ((path, leaf, _), mut modules) in groups {
        // The innermost wrapper first, as a plan takes them.
        modules.sort_by_key(|module| std::cmp::Reverse(module.key.len()));
        let mut named: Vec<&Parameter> = modules[0].parameters.iter().collect();
        let place =
            |parameter: &&Parameter| REGISTRATION.iter().position(|known| *known == parameter.name);
        if named.iter().all(|parameter| place(parameter).is_some()) {
            named.sort_by_key(place);
        } else if named.len() > 1 {
            continue;
        }
        match (named.as_slice(), modules.as_slice()) {
            ([], [module]) => drop(found.insert(module.key.as_str(), format!("{path}.{leaf}"))),
            (named, modules) if named.len() == modules.len() => {
                let pairs = modules.iter().zip(named);
                found.extend(pairs.map(|(module, parameter)| {
                    (module.key.as_str(), format!("{path}.{}", parameter.name))
                }));
            }
            _ => {}
        }
    }
    found
}
