//! What every back end must pass: `conformance!(module, make)` makes one test of each claim.

#[path = "../tests/conformance/backend.rs"]
mod backend;

pub(crate) use backend::{
    a_forgotten_page_is_gone_and_its_room_is_back, a_full_back_end_refuses_and_loses_nothing, page_with_noise,
    same_as_tells_the_page_from_any_other, what_is_stored_comes_back,
};

/// One test for each claim of a back end, about the one that `$make` makes.
macro_rules! conformance {
    ($module:ident, $make:expr) => {
        mod $module {
            #[test]
            fn what_is_stored_comes_back() {
                $crate::conformance::what_is_stored_comes_back($make);
            }

            #[test]
            fn same_as_tells_the_page_from_any_other() {
                $crate::conformance::same_as_tells_the_page_from_any_other($make);
            }

            #[test]
            fn a_forgotten_page_is_gone_and_its_room_is_back() {
                $crate::conformance::a_forgotten_page_is_gone_and_its_room_is_back($make);
            }

            #[test]
            fn a_full_back_end_refuses_and_loses_nothing() {
                $crate::conformance::a_full_back_end_refuses_and_loses_nothing($make);
            }
        }
    };
}
pub(crate) use conformance;
