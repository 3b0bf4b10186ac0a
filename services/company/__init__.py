"""Keeps companies, their users, sessions and activity, from what auth_events tells."""

from services.company.service import CompanyService

__all__ = ["CompanyService"]
