//! `lorafast._core`: the Python face of the core. Each function converts its arguments, detaches
//! from the interpreter, calls the core, and wraps the result. No logic lives here.

mod algebra;
mod analyze;
mod buffer;
mod conversion;
mod convert;
mod errors;
mod execution;
mod fleet;
mod inspect;
mod job;
mod operands;
mod parts;
mod plan;
mod similarity;
mod sources;
#[cfg(feature = "stores")]
mod stores;
mod table;
mod view;
mod write;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    use super::*;

    #[pymodule_export]
    use super::algebra::{
        bake_adapter, combine_adapters, extract_adapter, extract_part, plan_extraction,
        resize_adapter,
    };
    #[pymodule_export]
    use super::analyze::{analyze_adapter, compare_adapters, stored_factors};
    #[pymodule_export]
    use super::conversion::convert_adapter;
    #[pymodule_export]
    use super::execution::{Execution, OutputLock, recover_output};
    #[pymodule_export]
    use super::fleet::{FleetTables, ScannedAdapter, module_metrics, scan_adapters};
    #[pymodule_export]
    use super::inspect::{
        adapter_format, build_info, holds_adapter, identify_path, list_adapter, list_checkpoint,
    };
    #[pymodule_export]
    use super::parts::{assemble_shards, plan_digest, plan_groups, plan_shards, write_shards};
    #[pymodule_export]
    use super::plan::{Plan, names_fit, plan_base, plan_merge};
    #[pymodule_export]
    use super::similarity::{Collection, open_collection};
    #[cfg(feature = "stores")]
    #[pymodule_export]
    use super::stores::{IoMemory, StoreLocation};
    #[pymodule_export]
    use super::table::{ColumnBuffer, Table};
    #[pymodule_export]
    use super::view::{TensorBytes, View, ViewPart, ViewStream, open_view};
    #[pymodule_export]
    use super::write::write_adapter;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
